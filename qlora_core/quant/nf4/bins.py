"""The table by which the quantize kernel finds a code with one look-up and one comparison.

[-1, 1] is cut into 31 bins, each narrower than the smallest distance of two NF4 thresholds. So a bin
holds at most one of them, and a value's code is the number of thresholds in lower bins, plus one if
the value lies above the threshold of its own bin. Exact, because `bin_of` never descends.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qlora_core.quant.codebook import NF4_THRESHOLDS

BINS = 32
# Bins per unit. Any number from 12.5 (two thresholds in a bin) to 15.75 (bin 16 is bin -16) would
# do; with this one no threshold lies near an edge.
BINS_PER_UNIT = 14.625
# Added to a number below 16, this leaves four times the number in the sum's lowest bits.
ROUNDER = 1.5 * 2**21


def bin_of(scaled: Tensor) -> Tensor:
    """Sort float32 values of [-1, 1] into bins 0 to 31, as the kernel does: int64 of their shape.

    The bin of a negative value is that of two's complement, so that the order starts at 16.
    """
    bits = (scaled * BINS_PER_UNIT + ROUNDER).view(torch.int32)
    return (bits.long() & 0x7C) >> 2


@cache
def code_bins(device: torch.device) -> Tensor:
    """Give for each bin its threshold, or infinity, and the code of its low end.

    Returns:
        int64 [32] on ``device``: the threshold's float32 bits in the low half, the code in the high
        one. Shared, do not write to it.
    """
    thresholds = torch.tensor(NF4_THRESHOLDS, dtype=torch.float32, device="cpu")
    inside = torch.full((BINS,), torch.inf, dtype=torch.float32, device="cpu")
    inside[bin_of(thresholds)] = thresholds
    # Bins in ascending order of what they hold: -16 to 15, as two's complement 16 to 31, 0 to 15.
    order = (torch.arange(BINS, device="cpu") + BINS // 2) % BINS
    has_threshold = torch.isfinite(inside[order]).long()
    code = torch.empty(BINS, dtype=torch.int64, device="cpu")
    code[order] = has_threshold.cumsum(0) - has_threshold
    bits = inside.view(torch.int32).long() & 0xFFFFFFFF
    return (bits | code << 32).to(device)
