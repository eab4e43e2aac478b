"""Triton kernels for NF4. They check nothing: `launch` and `ops` do.

Each direction has two. The one that matters takes whole tiles of BLOCKS blocks: no masks, and codes
move as 32-bit words of eight, which the compiler joins to 16-byte loads and stores. What is left, less
than a tile, goes block by block under masks; a kernel of its own, so that it costs the other no
registers.

Products and the sum of double quantization are rounded one after the other, as in `reference`:
launch with ``enable_fp_fusion=False``. Where a tile begins is a 64-bit number, since a weight may have
more than 2^31 elements; inside a tile offsets are 32-bit.
"""

import triton
import triton.language as tl

from qlora_core.quant.codebook import NESTED_BLOCK_SIZE
from qlora_core.quant.nf4.bins import BINS, BINS_PER_UNIT, ROUNDER

# The reciprocal of a block of zeros becomes this, so that the zeros stay zeros.
_LARGEST = tl.constexpr(3.4028234663852886e38)
_NESTED_BLOCK_SIZE = tl.constexpr(NESTED_BLOCK_SIZE)
_BINS = tl.constexpr(BINS)
_BINS_PER_UNIT = tl.constexpr(BINS_PER_UNIT)
_ROUNDER = tl.constexpr(ROUNDER)
_LEVELS = tl.constexpr(16)


@triton.jit
def quantize_nf4_kernel(
    values,  # float16, bfloat16 or float32 [tiles * BLOCKS * BLOCK_SIZE]
    packed,  # out: uint8, half as many, 4-byte aligned
    absmax,  # out: float32 [tiles * BLOCKS]; not finite where the block is not
    bins,  # int64 [32], `bins.code_bins`
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write the codes and the scales of one tile."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    word = _words_of_tile(BLOCKS, BLOCK_SIZE)
    element = word[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    x = tl.load(values + first * BLOCK_SIZE + element).to(tl.float32)

    largest = _largest(x)
    tl.store(absmax + first + tl.arange(0, BLOCKS), largest)

    joined = tl.sum(_codes(x, largest, bins) << _shift_in_word()[None, None, :], axis=2)
    words = packed.to(tl.pointer_type(tl.uint32)) + first * (BLOCK_SIZE // 8)
    tl.store(words + word, joined.to(tl.uint32))


# The rest begins anywhere: one compiled form serves every alignment and size.
@triton.jit(
    do_not_specialize=["n"],
    do_not_specialize_on_alignment=["values", "packed", "absmax", "bins"],
)
def quantize_nf4_rest_kernel(
    values,  # float16, bfloat16 or float32 [n], less than a tile
    packed,  # out: uint8 [ceil(n / 2)]
    absmax,  # out: float32 [ceil(n / BLOCK_SIZE)]; not finite where the block is not
    bins,  # int64 [32], `bins.code_bins`
    n,
    BLOCK_SIZE: tl.constexpr,
):
    """Write the codes and the scale of one block."""
    HALF: tl.constexpr = BLOCK_SIZE // 2
    block = tl.program_id(0)
    word = _words_of_tile(1, BLOCK_SIZE) + block * (BLOCK_SIZE // 8)
    element = word[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    x = tl.load(values + element, mask=element < n, other=0.0).to(tl.float32)

    largest = _largest(x)
    tl.store(absmax + block + tl.arange(0, 1), largest)

    high, low = tl.split(tl.reshape(_codes(x, largest, bins), (HALF, 2)))
    byte = block * HALF + tl.arange(0, HALF)
    tl.store(packed + byte, ((high << 4) | low).to(tl.uint8), mask=byte < (n + 1) // 2)


@triton.jit
def _largest(x):
    """Give the largest absolute value of each block, [blocks, words, 8] -> [blocks].

    As integers: the bits of positive floats ascend with them, with infinity and then NaN on top, so
    that both show in the result.
    """
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(tl.max(bits, axis=2), axis=1).to(tl.float32, bitcast=True)


@triton.jit
def _codes(x, largest, bins):
    """Give the code of each value: float32 [blocks, words, 8] -> int32 of the same shape."""
    scaled = x * tl.minimum(tl.div_rn(1.0, largest), _LARGEST)[:, None, None]
    # `bins.bin_of`; the mask keeps even a NaN inside the table.
    rounded = tl.fma(scaled, _BINS_PER_UNIT, _ROUNDER)
    place = (rounded.to(tl.int32, bitcast=True) & (4 * (_BINS - 1))) >> 2
    table = tl.load(bins + tl.arange(0, _BINS))
    found = tl.reshape(tl.gather(table, tl.reshape(place, (x.numel,)), 0), x.shape)
    threshold = found.to(tl.int32).to(tl.float32, bitcast=True)
    # The sign of the difference tells exactly whether the value lies above the threshold.
    above = (threshold - scaled).to(tl.uint32, bitcast=True) >> 31
    return (found >> 32).to(tl.int32) + above.to(tl.int32)


@triton.jit
def dequantize_nf4_kernel(
    packed,  # uint8 [tiles * BLOCKS * BLOCK_SIZE / 2], 4-byte aligned
    absmax,  # [tiles * BLOCKS]; NESTED: uint8 codes, else float32
    nested_absmax,  # NESTED: float32 [ceil(tiles * BLOCKS / 256)]; else unused
    offset,  # NESTED: float32 []; else unused
    levels,  # float32 [16]
    dynamic_levels,  # NESTED: float32 [256]; else unused
    out,  # out: float16, bfloat16 or float32 [tiles * BLOCKS * BLOCK_SIZE]
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,  # divides 256, so that a tile lies in one nested block
    NESTED: tl.constexpr,
    GATHER: tl.constexpr,  # whether levels are looked up in shared memory, not through L1
):
    """Write the values of one tile, finding each block's scale on the way."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    scale = tl.load(absmax + first + tl.arange(0, BLOCKS))
    if NESTED:
        factor = tl.load(nested_absmax + first // _NESTED_BLOCK_SIZE)
        scale = tl.load(dynamic_levels + scale.to(tl.int32)) * factor + tl.load(offset)

    word = _words_of_tile(BLOCKS, BLOCK_SIZE)
    words = packed.to(tl.pointer_type(tl.uint32)) + first * (BLOCK_SIZE // 8)
    codes = ((tl.load(words + word)[:, :, None] >> _shift_in_word()[None, None, :]) & 0x0F).to(
        tl.int32
    )
    if GATHER:
        table = tl.load(levels + tl.arange(0, _LEVELS))
        level = tl.reshape(tl.gather(table, tl.reshape(codes, (codes.numel,)), 0), codes.shape)
    else:
        level = tl.load(levels + codes)

    element = word[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    values = (level * scale[:, None, None]).to(out.dtype.element_ty)
    tl.store(out + first * BLOCK_SIZE + element, values)


@triton.jit(
    do_not_specialize=["n"],
    do_not_specialize_on_alignment=[
        "packed",
        "absmax",
        "nested_absmax",
        "offset",
        "levels",
        "dynamic_levels",
        "out",
    ],
)
def dequantize_nf4_rest_kernel(
    packed,  # uint8 [ceil(n / 2)]
    absmax,  # [ceil(n / BLOCK_SIZE)]; NESTED: uint8 codes, else float32
    nested_absmax,  # NESTED: float32 [1]; else unused
    offset,  # NESTED: float32 []; else unused
    levels,  # float32 [16]
    dynamic_levels,  # NESTED: float32 [256]; else unused
    out,  # out: float16, bfloat16 or float32 [n], less than a tile
    n,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
):
    """Write the values of one block."""
    HALF: tl.constexpr = BLOCK_SIZE // 2
    block = tl.program_id(0)
    scale = tl.load(absmax + block)
    if NESTED:
        scale = tl.load(dynamic_levels + scale.to(tl.int32)) * tl.load(nested_absmax)
        scale += tl.load(offset)

    byte = block * HALF + tl.arange(0, HALF)
    codes = tl.load(packed + byte, mask=byte < (n + 1) // 2, other=0).to(tl.int32)
    high = tl.load(levels + (codes >> 4)) * scale
    low = tl.load(levels + (codes & 0x0F)) * scale
    element = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    values = tl.interleave(high, low).to(out.dtype.element_ty)
    tl.store(out + element, values, mask=element < n)


@triton.jit
def _words_of_tile(BLOCKS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Number a tile's 32-bit words of eight codes: int32 [BLOCKS, BLOCK_SIZE / 8]."""
    WORDS: tl.constexpr = BLOCK_SIZE // 8
    return tl.arange(0, BLOCKS)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]


@triton.jit
def _shift_in_word():
    """Give where each of a word's eight codes lies: a byte's first element is in its high half."""
    return (tl.arange(0, 8) ^ 1) * 4
