"""Double quantization on CPUs: the reference's results by table look-ups.

A code is found from the upper half of a scaled distance's bits and one exact comparison, because no
two thresholds of the dynamic map share such an upper half.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from qlora_core.quant.checks import has_plain_memory
from qlora_core.quant.codebook import NESTED_BLOCK_SIZE, dynamic_levels, dynamic_thresholds
from qlora_core.quant.double_quant import reference
from qlora_core.quant.nf4.reference import reciprocal
from qlora_core.quant.scratch import scratch
from qlora_core.quant.threads import share

_CPU = torch.device("cpu")
# Scales per part of the work: a multiple of the nested block size.
_CHUNK = 64 * 1024


@cache
def _code_table() -> Tensor:
    """For each upper half of a float32's bits, the code of the lowest value with it: int32 [65536]."""
    upper = torch.arange(2**16, dtype=torch.int32, device=_CPU)
    # Of negative values the lowest is the one with the largest bits.
    lower = torch.where(upper < 2**15, 0, 2**16 - 1).to(torch.int32)
    lowest = torch.bitwise_left_shift(upper, 16).bitwise_or(lower).view(torch.float32)
    return torch.bucketize(lowest, dynamic_thresholds(_CPU), out_int32=True)


@cache
def _next_threshold() -> Tensor:
    """For each code the threshold above it, or infinity: float32 [256]."""
    return functional.pad(dynamic_thresholds(_CPU), (0, 1), value=torch.inf)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give what `reference.quantize_absmax` gives, of scales on the CPU."""
    if not has_plain_memory(absmax):
        return reference.quantize_absmax(absmax)
    offset = absmax.mean()
    n = absmax.numel()
    codes = torch.empty(n, dtype=torch.uint8, device=_CPU)
    nested_absmax = torch.empty(-(-n // NESTED_BLOCK_SIZE), dtype=torch.float32, device=_CPU)

    def quantize(parts: Iterator[tuple[Tensor, Tensor, Tensor]]) -> None:
        for part, part_codes, part_nested in parts:
            padding = -part.numel() % NESTED_BLOCK_SIZE
            blocks = functional.pad(part - offset, (0, padding)).view(-1, NESTED_BLOCK_SIZE)
            torch.amax(blocks.abs(), dim=1, out=part_nested)
            blocks.mul_(reciprocal(part_nested)[:, None])
            part_codes.copy_(_encode(blocks.view(-1))[: part.numel()])

    parts = zip(
        absmax.split(_CHUNK),
        codes.split(_CHUNK),
        nested_absmax.split(_CHUNK // NESTED_BLOCK_SIZE),
        strict=True,
    )
    share(list(parts), quantize)
    return codes, nested_absmax, offset


def _encode(scaled: Tensor) -> Tensor:
    """Give the codes of values of [-1, 1]: float32 [n] -> int32 [n]."""
    upper = scaled.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF)
    codes = _code_table().index_select(0, upper)
    return codes.add_(scaled > _next_threshold().index_select(0, codes))


class ScaleRoom:
    """One thread's working memory for the scales of n blocks, in the shapes that `fill` needs."""

    def __init__(self, n: int) -> None:
        self._index = scratch("scale index", n, torch.int32)
        self._scales = scratch("scales", n, torch.float32)
        self._column = self._scales[:, None]
        whole = n - n % NESTED_BLOCK_SIZE
        self._nested_blocks = self._scales[:whole].view(-1, NESTED_BLOCK_SIZE)
        self._short_nested_block = self._scales[whole:] if whole < n else None

    def fill(self, codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
        """Find what `reference.dequantize_absmax` gives.

        Args:
            codes: uint8 [n].
            nested_absmax: float32 [ceil(n / 256), 1].
            offset: float32 [].

        Returns:
            float32 [n, 1], overwritten by the next call.
        """
        torch.index_select(dynamic_levels(_CPU), 0, self._index.copy_(codes), out=self._scales)
        if self._short_nested_block is None:
            self._nested_blocks.mul_(nested_absmax)
        else:
            self._nested_blocks.mul_(nested_absmax[:-1])
            self._short_nested_block.mul_(nested_absmax[-1])
        self._scales.add_(offset)
        return self._column
