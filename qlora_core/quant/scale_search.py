"""Better scales for NF4 in the same bits: for each block the scale that gives the least squared error.

The largest absolute value is the scale that clips nothing, rarely the one that fits best. What is
found here changes only numbers that the format stores anyway, so every reader of it reads this too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from qlora_core.quant.codebook import (
    NESTED_BLOCK_SIZE,
    dynamic_thresholds,
    nf4_levels,
    nf4_thresholds,
)
from qlora_core.quant.double_quant.ops import dequantize_absmax
from qlora_core.quant.nf4.ops import dequantize_nf4
from qlora_core.quant.nf4.reference import reciprocal
from qlora_core.quant.threads import share

# Trial scales, as shares of the block's largest absolute value, evenly spaced in their logarithm.
# Blocks of 4096 normally distributed values go down to 0.55, blocks of 32 up to 1.5.
_TRIALS = 32
_LOWEST, _HIGHEST = 0.5, 1.5
# Into how many bins [-1, 1] is divided for the trials. Finer ones find the same scales.
_BINS = 2048
# Into how many to find codes; 1 itself lies in one more.
_CODE_BINS = 32
# Elements at a time: what stays in the caches of a CPU; on a GPU enough to hide the launches. About
# 30 bytes of scratch memory for each.
_CPU_CHUNK, _GPU_CHUNK = 2**17, 2**22
_TWO_ZEROS = 0x77


def improve_scales(
    values: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    *,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Give codes and scales with less squared error than those from the largest absolute values.

    Doubly quantized scales keep their nested scales and offset: each block then chooses among the 256
    scales that those offer, and its codes are found anew for the one it gets. So the scale it had is
    always among its choices, and no block's error, taken in float32, ever grows; where nothing is
    better, the block keeps scale and codes. A scale that is infinite in the dtype of ``values`` is
    none: double quantization makes one of the largest float16 numbers now and then, and here such a
    block gets another.

    Args:
        values: what was quantized, n elements; float16, bfloat16 or float32, all finite.
        packed: their codes, uint8 [ceil(n / 2)].
        absmax: their scales, [ceil(n / block_size)]: float32, or uint8 codes when doubly quantized.
        nested_absmax: float32 [ceil(blocks / 256)] when doubly quantized, else None.
        offset: float32 [] when doubly quantized, else None.
        block_size: elements per scale.

    Returns:
        New packed and absmax, of the same kind as the old.
    """
    half = block_size // 2
    missing = absmax.numel() * half - packed.numel()
    codes = functional.pad(packed, (0, missing), value=_TWO_ZEROS).view(-1, half)
    scales = absmax.clone()
    largest = torch.finfo(values.dtype).max

    def improve(place: slice, blocks: Tensor) -> None:
        new = wanted = _best_scales(blocks).clamp_(max=largest)
        old_scales = absmax[place]
        if nested_absmax is not None and offset is not None:
            # A place begins where a nested block does.
            nested = nested_absmax[
                place.start // NESTED_BLOCK_SIZE : -(-place.stop // NESTED_BLOCK_SIZE)
            ]
            new = _nearest_codes(wanted, nested, offset)
            # The nearest may lie above; then the next lower one lies below.
            above = _is_infinite(dequantize_absmax(new, nested, offset), values.dtype)
            wanted = dequantize_absmax(new.sub_(above.to(torch.uint8)), nested, offset)
            old_scales = dequantize_absmax(absmax[place], nested, offset)
        new_codes = _encode(blocks, wanted)
        new_error = _squared_error(blocks, new_codes, wanted)
        # A comparison with NaN, from a scale beyond the largest float32, is false as well.
        better = new_error < _squared_error(blocks, codes[place], old_scales)
        better |= _is_infinite(old_scales, values.dtype)
        better &= (wanted > 0) & ~_is_infinite(wanted, values.dtype)
        codes[place] = torch.where(better[:, None], new_codes, codes[place])
        scales[place] = torch.where(better, new, scales[place])

    _in_chunks(values.detach().reshape(-1), block_size, improve, nested=nested_absmax is not None)
    return codes.view(-1)[: packed.numel()], scales


def _in_chunks(
    flat: Tensor, block_size: int, work: Callable[[slice, Tensor], None], *, nested: bool
) -> None:
    """Do the work on all blocks, some at a time: where they are, and float32 [blocks, block_size].

    A short last block is filled up with zeros: they have no error, and move no scale. Where there
    are nested blocks, those at a time are whole ones.
    """
    on_cpu = flat.device.type == "cpu"
    step = max(
        (_CPU_CHUNK if on_cpu else _GPU_CHUNK) // block_size, NESTED_BLOCK_SIZE if nested else 1
    )
    n_blocks = -(-flat.numel() // block_size)

    def work_on(starts: Iterator[int]) -> None:
        for start in starts:
            stop = min(start + step, n_blocks)
            part = flat[start * block_size : stop * block_size].float()
            missing = (stop - start) * block_size - part.numel()
            work(slice(start, stop), functional.pad(part, (0, missing)).view(-1, block_size))

    starts = range(0, n_blocks, step)
    if on_cpu:
        share(starts, work_on)
    else:
        work_on(iter(starts))


def _best_scales(blocks: Tensor) -> Tensor:
    """Give the best scales that the trials lead to: values [blocks, block_size] -> float32 [blocks].

    A trial scale gives each value x of a block a level q. The scale that fits those levels best is
    A / B, with A = sum(x q) and B = sum(q q), and it leaves the error sum(x x) - A A / B. So the
    trial with the largest A A / B wins. `_sums_of_trials` holds both for every value there may be.
    """
    largest = blocks.abs().amax(dim=1)
    bins = (blocks * reciprocal(largest)[:, None]).add_(1).mul_(_BINS / 2).int()
    sums = functional.embedding_bag(
        bins.clamp_(max=_BINS - 1), _sums_of_trials(blocks.device), mode="sum"
    )
    products, squares = sums.split(_TRIALS, dim=1)
    # Below the square of any level but zero: only keeps a block of zeros from dividing by zero.
    squares = squares.clamp(min=1e-3)
    best = (products.square() / squares).argmax(dim=1, keepdim=True)
    return largest * (products.gather(1, best) / squares.gather(1, best)).view(-1)


@cache
def _sums_of_trials(device: torch.device) -> Tensor:
    """For the middle x of each bin and each trial's level q of it, x q and q q: float32 [bins, 2 trials]."""
    places = torch.arange(_BINS, dtype=torch.float32, device=device)
    middles = (places + 0.5) * (2 / _BINS) - 1
    trials = torch.logspace(
        math.log10(_LOWEST),
        math.log10(_HIGHEST),
        _TRIALS,
        dtype=torch.float32,
        device=device,
    )
    codes = torch.bucketize(middles[:, None] / trials, nf4_thresholds(device))
    levels = nf4_levels(device)[codes]
    return torch.cat((middles[:, None] * levels, levels.square()), dim=1)


def _nearest_codes(scales: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """Give the 8-bit codes that come nearest to ``scales`` under given nested scales: uint8 [blocks]."""
    inverse = reciprocal(nested_absmax).repeat_interleave(NESTED_BLOCK_SIZE)[: scales.numel()]
    codes = torch.searchsorted(dynamic_thresholds(scales.device), (scales - offset) * inverse)
    return codes.to(torch.uint8)


def _is_infinite(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether level 1 under a scale is infinite in ``dtype``: float32 [blocks] -> bool [blocks]."""
    return scales.to(dtype).isinf()


def _encode(blocks: Tensor, scales: Tensor) -> Tensor:
    """Give the nearest codes under ``scales``, packed: [blocks, block_size] -> uint8 [blocks, half]."""
    scaled = (blocks * reciprocal(scales)[:, None]).clamp_(-1, 1).view(-1)
    code_of_bin, threshold_of_bin = _code_bins(blocks.device)
    bins = _code_bin_of(scaled)
    codes = code_of_bin.index_select(0, bins)
    codes += scaled > threshold_of_bin.index_select(0, bins)
    pairs = codes.view(torch.int16)  # the even element's code is in the lower byte
    return ((pairs << 4) | (pairs >> 8)).to(torch.uint8).view(len(blocks), -1)


def _code_bin_of(scaled: Tensor) -> Tensor:
    """Sort values of [-1, 1] into bins narrower than the distance of any two thresholds: int32."""
    return scaled.add(1).mul_(_CODE_BINS / 2).int()


@cache
def _code_bins(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each bin the code of its low end, uint8, and the threshold inside it or infinity, float32.

    Exact, because `_code_bin_of` never descends: a value in a lower bin than a threshold's own lies
    below that threshold, one in a higher bin above it.
    """
    thresholds = nf4_thresholds(device)
    bins = _code_bin_of(thresholds)
    every = torch.arange(_CODE_BINS + 1, dtype=torch.int32, device=device)
    inside = torch.full(every.shape, torch.inf, dtype=torch.float32, device=device)
    inside[bins.long()] = thresholds
    return torch.searchsorted(bins, every).to(torch.uint8), inside


def _squared_error(blocks: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """Give the sum of squared errors of each block, float64 [blocks]: exact enough to compare any two."""
    values = dequantize_nf4(
        packed.reshape(-1), scales, n=blocks.numel(), block_size=blocks.shape[1]
    )
    return (blocks.double() - values.view_as(blocks)).square_().sum(dim=1)
