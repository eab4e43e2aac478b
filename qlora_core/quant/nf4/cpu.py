"""NF4 on CPUs: the reference's results by table look-ups over chunks, spread over a few threads.

Tensors that are more than their memory, and those that torch.compile traces, take the reference itself.
Dequantizing looks up both elements of a byte at once, where it is not done by `compiled`.
Quantizing sorts scaled values into 65,536 bins and looks up a bin's code; the few values whose bin
is near a threshold are compared exactly.
A chunk holds whole blocks, also nested ones, so which thread takes which chunk changes nothing.

The loops make every view of their working memory beforehand: each call of torch, even for a view,
hands Python's lock to another thread, which costs more than the call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache, partial

import torch
from torch import Tensor

from qlora_core.quant.checks import check_scales_finite, has_plain_memory
from qlora_core.quant.codebook import (
    NESTED_BLOCK_SIZE,
    NF4_LEVELS,
    NF4_THRESHOLDS,
    nf4_thresholds,
)
from qlora_core.quant.double_quant.cpu import ScaleRoom
from qlora_core.quant.double_quant.reference import dequantize_absmax
from qlora_core.quant.memory import empty
from qlora_core.quant.nf4 import compiled, reference
from qlora_core.quant.scratch import scratch
from qlora_core.quant.threads import share

_CPU = torch.device("cpu")
# Elements, a multiple of every block size. With smaller chunks threads wait for Python's lock, larger
# ones leave the cache.
_CHUNK = 512 * 1024

_BINS = 2**16
_HALF = (_BINS - 1) / 2
_UNSURE = 0x80  # instead of a code
_EIGHT_UNSURE = -0x7F7F7F7F7F7F7F80  # in any of the eight bytes of an int64


@cache
def _pair_table() -> Tensor:
    """For each byte its two levels, side by side in one int64: int64 [256]."""
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float32, device=_CPU)
    codes = torch.arange(256, device=_CPU)
    pairs = torch.stack((levels[codes >> 4], levels[codes & 0x0F]), dim=1)
    return pairs.contiguous().view(torch.int64).view(-1)


@cache
def _code_table() -> Tensor:
    """For each bin the code of its values, or `_UNSURE` where that takes a comparison: uint8 [_BINS].

    `_encode` finds a value's bin to within an eighth of one, however the machine rounds on the way:
    a float32 below 2^16 has at least eight bits after the point. So only bins within that distance
    of a threshold are unsure.
    """
    places = [_HALF + threshold * _HALF for threshold in NF4_THRESHOLDS]
    bins = torch.arange(_BINS, dtype=torch.float64, device=_CPU)
    table = torch.bucketize(bins, torch.tensor(places, dtype=torch.float64, device=_CPU))
    for near in (-1 / 8, 1 / 8):
        table[[math.floor(place + near) for place in places]] = _UNSURE
    return table.to(torch.uint8)


class _DequantizeRoom:
    """One thread's working memory for chunks of n elements, in the shapes that the loop needs."""

    def __init__(self, n: int, block_size: int) -> None:
        self.index = scratch("index", n // 2, torch.int32)
        self.pairs = scratch("floats", n // 2, torch.int64)
        self.values = self.pairs.view(torch.float32)
        self.blocks = self.values.view(-1, block_size)
        self.scales = ScaleRoom(n // block_size)


def dequantize_nf4_into(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
    *,
    block_size: int,
) -> None:
    """Fill ``out`` [n] with what the two `reference` modules give, one after the other.

    Args:
        packed: uint8 [ceil(n / 2)] on the CPU.
        absmax: [ceil(n / block_size)], float32 scales, or their uint8 codes.
        nested_absmax: float32 [ceil(blocks / 256)] when there are codes, else None.
        offset: float32 [] when there are codes, else None.
        out: float32, float16 or bfloat16 [n], contiguous.
        block_size: elements per scale.
    """
    n = out.numel()
    if not has_plain_memory(packed, absmax, nested_absmax, offset, out):
        scales = absmax
        if nested_absmax is not None and offset is not None:
            scales = dequantize_absmax(absmax, nested_absmax, offset)
        out.copy_(
            reference.dequantize_nf4(packed, scales, n=n, block_size=block_size, dtype=out.dtype)
        )
        return
    blocks = n // block_size
    whole = blocks * block_size
    if whole:
        parts = packed[: whole // 2], absmax[:blocks], nested_absmax, offset, out[:whole]
        if not compiled.fill(*parts, block_size=block_size):
            fill_by_tables(*parts, block_size=block_size)
    if whole < n:
        last = absmax[blocks:]
        if nested_absmax is not None and offset is not None:
            last = dequantize_absmax(last, nested_absmax[-1:], offset)
        out[whole:] = reference.dequantize_nf4(
            packed[whole // 2 :], last, n=n - whole, block_size=block_size, dtype=out.dtype
        )


def fill_by_tables(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
    *,
    block_size: int,
) -> None:
    """Fill ``out``, which is whole blocks, as `compiled.fill` does: by torch alone, on any CPU."""
    chunk = max(_CHUNK, NESTED_BLOCK_SIZE * block_size)
    scales = absmax[:, None].split(chunk // block_size)
    nested = [None] * len(scales)
    if nested_absmax is not None:
        # Without the one that only a short last block is in.
        needed = nested_absmax[: -(-absmax.numel() // NESTED_BLOCK_SIZE), None]
        nested = needed.split(chunk // block_size // NESTED_BLOCK_SIZE)
    parts = zip(packed.split(chunk // 2), scales, nested, out.split(chunk), strict=True)
    # A view of 8-byte pairs begins on an 8-byte boundary.
    direct = (
        out.dtype == torch.float32 and out.data_ptr() % 8 == 0 and out.storage_offset() % 2 == 0
    )
    work = partial(_dequantize, offset=offset, block_size=block_size, direct=direct)
    share(list(parts), work)


def _dequantize(
    parts: Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor]],
    *,
    offset: Tensor | None,
    block_size: int,
    direct: bool,
) -> None:
    """Fill the outs of whole blocks: (packed, absmax, nested_absmax, out) each, scales as columns."""
    table = _pair_table()
    n, room = 0, None
    for packed, absmax, nested_absmax, out in parts:
        if room is None or out.numel() != n:
            n = out.numel()
            room = _DequantizeRoom(n, block_size)
        scales = absmax
        if nested_absmax is not None and offset is not None:
            scales = room.scales.fill(absmax.view(-1), nested_absmax, offset)
        pairs = out.view(torch.int64) if direct else room.pairs
        torch.index_select(table, 0, room.index.copy_(packed), out=pairs)
        if direct:
            out.view(-1, block_size).mul_(scales)
        else:
            room.blocks.mul_(scales)
            out.copy_(room.values)


class _QuantizeRoom:
    """One thread's working memory for chunks of n elements, in the shapes that the loop needs."""

    def __init__(self, n: int, block_size: int) -> None:
        self.scaled = scratch("scaled", n, torch.float32)
        self.blocks = self.scaled.view(-1, block_size)
        self.eights = self.scaled.view(-1, 8)
        # One after the other: magnitudes, places among the bins, bins.
        self.floats = scratch("floats", n, torch.float32)
        self.magnitudes = self.floats.view(-1, block_size)
        self.bins = self.floats.view(torch.int32)
        self.codes = scratch("codes", n, torch.uint8)
        self.eight_codes = self.codes.view(-1, 8)
        self.eight_codes_as_one = self.codes.view(torch.int64)
        self.unsure = scratch("unsure", n // 8, torch.int64)
        self.pairs = self.codes.view(torch.int16)  # the even element's code is the lower byte
        self.high = scratch("high", n // 2, torch.int16)


def quantize_nf4(values: Tensor, *, block_size: int, name: str) -> tuple[Tensor, Tensor]:
    """Give what `reference.quantize_nf4` gives, with scratch memory of a few chunks per thread.

    Args:
        values: float16, bfloat16 or float32 [n], contiguous, on the CPU.
        block_size: elements per scale.
        name: of the tensor, for error messages.

    Returns:
        packed uint8 [ceil(n / 2)] and absmax float32 [ceil(n / block_size)].

    Raises:
        NonFiniteError: the values hold NaN or infinity; found chunk by chunk, on the way.
    """
    n = values.numel()
    if not has_plain_memory(values):
        packed, absmax = reference.quantize_nf4(values, block_size=block_size)
        check_scales_finite(absmax, name)
        return packed, absmax
    packed = empty((n + 1) // 2, torch.uint8)
    absmax = empty(-(-n // block_size), torch.float32)
    blocks = n // block_size
    whole = blocks * block_size
    if whole:
        parts = zip(
            values[:whole].split(_CHUNK),
            packed[: whole // 2].split(_CHUNK // 2),
            absmax[:blocks].split(_CHUNK // block_size),
            strict=True,
        )
        share(list(parts), partial(_quantize, block_size=block_size, name=name))
    if whole < n:
        tail_packed, tail_absmax = reference.quantize_nf4(values[whole:], block_size=block_size)
        check_scales_finite(tail_absmax, name)
        packed[whole // 2 :] = tail_packed
        absmax[blocks:] = tail_absmax
    return packed, absmax


def _quantize(
    parts: Iterator[tuple[Tensor, Tensor, Tensor]], *, block_size: int, name: str
) -> None:
    """Fill the codes and scales of whole blocks: (values, packed, absmax) each."""
    n, room = 0, None
    for values, packed, absmax in parts:
        if room is None or values.numel() != n:
            n = values.numel()
            room = _QuantizeRoom(n, block_size)
        room.scaled.copy_(values)
        torch.abs(room.blocks, out=room.magnitudes)
        torch.amax(room.magnitudes, dim=1, out=absmax)
        check_scales_finite(absmax, name)
        room.blocks.mul_(reference.reciprocal(absmax)[:, None])
        _encode(room)
        torch.bitwise_left_shift(room.pairs, 4, out=room.high)
        packed.copy_(room.high.bitwise_or_(room.pairs.bitwise_right_shift_(8)))


def _encode(room: _QuantizeRoom) -> None:
    """Turn the scaled values, in [-1, 1], into codes."""
    middle = torch.tensor(_HALF, dtype=torch.float32, device=_CPU)
    torch.add(middle, room.scaled, alpha=_HALF, out=room.floats)
    torch.index_select(_code_table(), 0, room.bins.copy_(room.floats), out=room.codes)

    # Looked for by eights, since torch is slow at finding single elements.
    torch.bitwise_and(room.eight_codes_as_one, _EIGHT_UNSURE, out=room.unsure)
    unsure = torch.nonzero(room.unsure).view(-1)
    exact = torch.bucketize(room.eights[unsure], nf4_thresholds(_CPU))
    room.eight_codes[unsure] = exact.to(torch.uint8)
