"""NF4 on CPUs: the reference's results by table look-ups over chunks that stay in the cache.

Dequantizing looks up both elements of a byte at once; quantizing finds the code from one of 4096
bins and a single exact comparison, because no bin holds more than one threshold.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qlora_core.quant.codebook import NF4_LEVELS, NF4_THRESHOLDS
from qlora_core.quant.nf4 import reference

_CPU = torch.device("cpu")
# Multiples of half the largest block size, so that a chunk never splits a block.
_CHUNK_BYTES = 128 * 1024
_CHUNK_ELEMENTS = 256 * 1024
_BINS = 4096


@cache
def _pair_table() -> Tensor:
    """For each byte its two levels, side by side in one int64: int64 [256]."""
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float32, device=_CPU)
    codes = torch.arange(256, device=_CPU)
    pairs = torch.stack((levels[codes >> 4], levels[codes & 0x0F]), dim=1)
    return pairs.contiguous().view(torch.int64).view(-1)


def _bin_of(scaled: Tensor) -> Tensor:
    """Sort values of [-1, 1] into bins; never descending in the value, whatever the rounding."""
    return scaled.add(1.0).mul_((_BINS - 1) / 2).int()


@cache
def _bin_tables() -> tuple[Tensor, Tensor]:
    """For each bin the code of its low end, uint8, and the threshold inside it or infinity, float32.

    Exact, because `_bin_of` never descends: a value in a lower bin than a threshold's own lies
    below that threshold, one in a higher bin above it.
    """
    thresholds = torch.tensor(NF4_THRESHOLDS, dtype=torch.float32, device=_CPU)
    bins = _bin_of(thresholds)
    code = (torch.arange(_BINS, device=_CPU)[:, None] > bins).sum(dim=1).to(torch.uint8)
    inside = torch.full((_BINS,), torch.inf, device=_CPU)
    inside[bins.long()] = thresholds
    return code, inside


def dequantize_nf4_into(packed: Tensor, absmax: Tensor, out: Tensor, *, block_size: int) -> None:
    """Fill ``out`` [n] with what `reference.dequantize_nf4` gives, chunk by chunk.

    Args:
        packed: uint8 [ceil(n / 2)] on the CPU.
        absmax: float32 [ceil(n / block_size)].
        out: float32, float16 or bfloat16 [n], contiguous.
        block_size: elements per scale.
    """
    n = out.numel()
    whole = n // block_size * block_size
    chunk = min(_CHUNK_BYTES, whole // 2)
    index = torch.empty(chunk, dtype=torch.int32)
    # An 8-byte view of `out` needs its first element on an 8-byte boundary.
    direct = (
        out.dtype == torch.float32 and out.data_ptr() % 8 == 0 and out.storage_offset() % 2 == 0
    )
    scratch = torch.empty(0 if direct else chunk, dtype=torch.int64)

    for start in range(0, whole // 2, _CHUNK_BYTES):
        stop = min(start + _CHUNK_BYTES, whole // 2)
        target = out[2 * start : 2 * stop]
        pairs = target.view(torch.int64) if direct else scratch[: stop - start]
        index_part = index[: stop - start].copy_(packed[start:stop])
        torch.index_select(_pair_table(), 0, index_part, out=pairs)
        values = pairs.view(torch.float32).view(-1, block_size)
        values.mul_(absmax[2 * start // block_size : 2 * stop // block_size, None])
        if not direct:
            target.copy_(values.view(-1))

    if whole < n:
        out[whole:] = reference.dequantize_nf4(
            packed[whole // 2 :], absmax[-1:], n=n - whole, block_size=block_size, dtype=out.dtype
        )


def quantize_nf4(values: Tensor, *, block_size: int) -> tuple[Tensor, Tensor]:
    """Give what `reference.quantize_nf4` gives, with scratch memory of a few chunks.

    Args:
        values: float16, bfloat16 or float32 [n], contiguous, on the CPU.
        block_size: elements per scale.

    Returns:
        packed uint8 [ceil(n / 2)] and absmax float32 [ceil(n / block_size)]; absmax is not finite
        where the values are not.
    """
    n = values.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32)
    whole = n // block_size * block_size

    for start in range(0, whole, _CHUNK_ELEMENTS):
        stop = min(start + _CHUNK_ELEMENTS, whole)
        blocks = values[start:stop].float().view(-1, block_size)
        scales = torch.linalg.vector_norm(blocks, torch.inf, dim=1)
        absmax[start // block_size : stop // block_size] = scales
        if bool(torch.isfinite(scales).all()):
            packed[start // 2 : stop // 2] = _encode(blocks, scales)

    if whole < n:
        tail_packed, tail_absmax = reference.quantize_nf4(values[whole:], block_size=block_size)
        packed[whole // 2 :] = tail_packed
        absmax[-1:] = tail_absmax
    return packed, absmax


def _encode(blocks: Tensor, absmax: Tensor) -> Tensor:
    """Give the packed codes of whole blocks: float32 [blocks, block_size] -> uint8 [bytes]."""
    scaled = (blocks * reference.reciprocal(absmax)[:, None]).view(-1)
    bins = _bin_of(scaled)
    code_of_bin, threshold_of_bin = _bin_tables()
    codes = code_of_bin.index_select(0, bins)
    codes += scaled > threshold_of_bin.index_select(0, bins)
    return (codes[0::2] << 4) | codes[1::2]
