"""The 8-bit dynamic maps on a device, and a small table that finds a code with two look-ups.

No two thresholds of a map share the upper half of a float32's bits, so a table over those halves is at
most one code short, and one exact comparison mends that. Only halves from 2^-24 to 1 are in it: all
thresholds are.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from qlora_core.quant.codebook import dynamic_map

# The upper halves of 2^-24 and of 1, and how many there are from one to the other.
LOWEST_HALF = 103 << 7
HIGHEST_HALF = 127 << 7
HALVES = HIGHEST_HALF - LOWEST_HALF + 1


@cache
def levels(device: torch.device, *, signed: bool) -> Tensor:
    """Give `codebook.dynamic_map` as float32 [256] on ``device``; shared, do not write to it."""
    return torch.tensor(dynamic_map(signed=signed), dtype=torch.float32, device=device)


@cache
def thresholds(device: torch.device, *, signed: bool) -> Tensor:
    """Give the float32 midpoints of the map and, above all codes, infinity: [256]; shared."""
    ascending = levels(device, signed=signed)
    return functional.pad((ascending[:-1] + ascending[1:]) * 0.5, (0, 1), value=torch.inf)


@cache
def code_table(device: torch.device, *, signed: bool) -> Tensor:
    """Give for each upper half the code of the lowest value with it, those of negative values last.

    Returns:
        uint8 [2 * HALVES] on ``device``; the second part means nothing for the unsigned map. Shared.
    """
    halves = torch.arange(LOWEST_HALF, HIGHEST_HALF + 1, dtype=torch.int32)
    positive = (halves << 16).view(torch.float32)
    # Of negative values the lowest is the one with the largest bits.
    negative = -((halves << 16) + 0xFFFF).view(torch.float32)
    bounds = thresholds(torch.device("cpu"), signed=signed)
    return torch.bucketize(torch.cat((positive, negative)), bounds).to(torch.uint8).to(device)
