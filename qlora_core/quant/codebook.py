"""The number tables of the storage format: the sixteen NF4 levels and the 8-bit dynamic map.

Both are compared bit for bit with what other tools read and write, so the values here are float32
values written out in full; nothing may recompute them in another precision.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# QLoRA, arXiv:2305.14314, appendix E: quantiles of N(0, 1), asymmetric so that zero is exact.
NF4_LEVELS: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# The midpoints of neighbouring levels, rounded to float32: a code is the number of these that lie
# strictly below the scaled value, so a value on a threshold gets the lower level.
NF4_THRESHOLDS: tuple[float, ...] = (
    -0.8480963706970215,
    -0.6106328964233398,
    -0.4599952697753906,
    -0.33967941999435425,
    -0.23460739850997925,
    -0.13791173696517944,
    -0.045525018125772476,
    0.03979014977812767,
    0.120255246758461,
    0.2035212516784668,
    0.2920137643814087,
    0.3893125355243683,
    0.5016634464263916,
    0.6427869200706482,
    0.8614784479141235,
)
BLOCK_SIZES: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256

_EXPONENTS = 7


@cache
def dynamic_map(*, signed: bool = True) -> tuple[float, ...]:
    """Give the 256 levels of the 8-bit dynamic data type, ascending, as exact float32 values.

    For each power of ten 10^(i-6), i in 0..6, the mid-points of an even division of [0.1, 1] into
    2^i (signed) or 2^(i+1) (unsigned) parts, negated as well when signed; then 0 and 1.

    Source: Dettmers, "8-bit Approximations for Parallelism in Deep Learning", arXiv:1511.04561,
    in the form of "8-bit Optimizers", arXiv:2110.02861.
    """
    levels = [0.0, 1.0]
    for exponent in range(_EXPONENTS):
        parts = 2**exponent if signed else 2 ** (exponent + 1)
        edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float32, device="cpu")
        middles = (edges[:-1] + edges[1:]) / 2.0
        scaled = (middles * 10.0 ** (exponent - _EXPONENTS + 1)).tolist()
        levels += scaled
        if signed:
            levels += [-level for level in scaled]
    return tuple(sorted(levels))


@cache
def nf4_levels(device: torch.device) -> Tensor:
    """Give `NF4_LEVELS` as float32 [16] on ``device``; shared, do not write to it."""
    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


@cache
def nf4_thresholds(device: torch.device) -> Tensor:
    """Give `NF4_THRESHOLDS` as float32 [15] on ``device``; shared, do not write to it."""
    return torch.tensor(NF4_THRESHOLDS, dtype=torch.float32, device=device)


@cache
def dynamic_levels(device: torch.device) -> Tensor:
    """Give the signed `dynamic_map` as float32 [256] on ``device``; shared, do not write to it."""
    return torch.tensor(dynamic_map(signed=True), dtype=torch.float32, device=device)


@cache
def dynamic_thresholds(device: torch.device) -> Tensor:
    """Give the float32 midpoints of the signed `dynamic_map`, [255], on ``device``; shared."""
    levels = dynamic_levels(device)
    return (levels[:-1] + levels[1:]) * 0.5
