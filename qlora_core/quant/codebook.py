"""The number tables of the storage formats: NF4, its comparators, and the 8-bit dynamic map.

Each is derived by the rule it was published with, in Python's floats, and rounded to float32 where
the published one was. Other tools compare and multiply with these bits, so nothing may compute them
another way: `torch.linspace`, for one, gives other last bits on CPUs that do not fuse
multiplication and addition.
"""

from __future__ import annotations

import struct
from functools import cache
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

BLOCK_SIZES: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256

_EXPONENTS = 7


def _float32(value: float) -> float:
    """Round to the nearest float32."""
    return struct.unpack("f", struct.pack("f", value))[0]


def _evenly(start: float, stop: float, count: int) -> list[float]:
    """Give ``count`` evenly spaced float32 values from ``start`` to ``stop``, both included.

    The first half is counted from the start and the second from the end, each rounded once.
    """
    start, stop = _float32(start), _float32(stop)
    step = _float32((stop - start) / (count - 1))
    half = count // 2
    return [_float32(start + i * step) for i in range(half)] + [
        _float32(stop - i * step) for i in reversed(range(count - half))
    ]


def _middles(values: list[float]) -> list[float]:
    """Give the float32 nearest to the middle between each value and the next."""
    return [_float32((low + high) / 2) for low, high in pairwise(values)]


def ascending_codes(levels: tuple[float, ...]) -> tuple[int, ...]:
    """Give the codes in the order of their ``levels``, of equal ones the smaller code first."""
    return tuple(sorted(range(len(levels)), key=lambda code: (levels[code], code)))


def thresholds_between(levels: tuple[float, ...]) -> tuple[float, ...]:
    """Give the float32 midpoints of ``levels`` in ascending order, one fewer than there are levels."""
    return tuple(_middles(sorted(levels)))


def _normal_float_levels() -> tuple[float, ...]:
    """Derive the sixteen NF4 levels: quantiles of N(0, 1), asymmetric so that zero is exact.

    Eight levels are above zero and seven below. On each side they are the quantiles at evenly spaced
    probabilities from the outermost one down to 1/2, which is zero itself, divided by the largest.
    The outermost probability lies between those that 16 and 15 levels alone would have, 1 - 1/32 and
    1 - 1/30: it is their mean, to seven digits.

    Source: QLoRA, arXiv:2305.14314, appendix E; the seven digits are those of bitsandbytes 0.50.2,
    ``functional.create_normal_map``.
    """
    outermost = round(((1 - 1 / 32) + (1 - 1 / 30)) / 2, 7)
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in _evenly(outermost, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in _evenly(outermost, 0.5, 8)[:-1]]
    levels = sorted(_float32(level) for level in [*below, 0.0, *above])
    return tuple(_float32(level / levels[-1]) for level in levels)


# A code is the index of its level.
NF4_LEVELS: tuple[float, ...] = _normal_float_levels()
# A code is the number of these that lie strictly below the scaled value, so a value on a threshold
# gets the lower level.
NF4_THRESHOLDS: tuple[float, ...] = thresholds_between(NF4_LEVELS)


def _four_bit_floats(magnitudes: tuple[float, ...]) -> tuple[float, ...]:
    """Give the levels of codes whose highest bit is the sign, in units of the largest magnitude."""
    largest = max(magnitudes)
    # Adding zero makes the negative zero a positive one.
    return tuple(_float32(sign * size / largest) + 0.0 for sign in (1, -1) for size in magnitudes)


# Sign, two bits of exponent, one of mantissa, as bitsandbytes reads them: a code is a bit pattern,
# not an order, and the smallest magnitude is 1/16 where the standard's would be 1. Source:
# bitsandbytes 0.50.2, ``functional.get_4bit_type``.
FP4_LEVELS: tuple[float, ...] = _four_bit_floats((0, 0.0625, 8, 12, 4, 6, 2, 3))
# The same as the standard has it. Source: OCP Microscaling Formats (MX) 1.0.
E2M1_LEVELS: tuple[float, ...] = _four_bit_floats((0, 0.5, 1, 1.5, 2, 3, 4, 6))


@cache
def dynamic_map(*, signed: bool = True) -> tuple[float, ...]:
    """Give the 256 levels of the 8-bit dynamic data type, ascending, as exact float32 values.

    For each power of ten 10^(i-6), i in 0..6, the middles of an even division of [0.1, 1] into
    2^i (signed) or 2^(i+1) (unsigned) parts, negated as well when signed; then 0 and 1.

    Source: Dettmers, "8-bit Approximations for Parallelism in Deep Learning", arXiv:1511.04561,
    in the form of "8-bit Optimizers", arXiv:2110.02861.
    """
    levels = [0.0, 1.0]
    for exponent in range(_EXPONENTS):
        parts = 2**exponent if signed else 2 ** (exponent + 1)
        power = _float32(10.0 ** (exponent - _EXPONENTS + 1))
        scaled = [_float32(middle * power) for middle in _middles(_evenly(0.1, 1.0, parts + 1))]
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
