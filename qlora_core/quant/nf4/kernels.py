"""Triton kernels for NF4. They check nothing: `ops` does.

Each program takes BLOCKS blocks of BLOCK_SIZE elements, so that a scale is found once per row of
the tile. Products and the sum of double quantization are rounded one after the other, as in
`reference`: launch with ``enable_fp_fusion=False``. Offsets are 64-bit: a weight may have more than
2^31 elements.
"""

import triton
import triton.language as tl

from qlora_core.quant.codebook import NF4_THRESHOLDS

# The reciprocal of a block of zeros becomes this, so that the zeros stay zeros.
_LARGEST = tl.constexpr(3.4028234663852886e38)
_THRESHOLDS = tl.constexpr(NF4_THRESHOLDS)
_NESTED_BLOCK_SIZE = tl.constexpr(256)


@triton.jit
def quantize_nf4_kernel(
    values,  # float16, bfloat16 or float32 [n]
    packed,  # out: uint8 [ceil(n / 2)]
    absmax,  # out: float32 [n_blocks]; NaN where the block holds NaN
    n,
    n_blocks,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write the codes and the scale of BLOCKS blocks."""
    HALF: tl.constexpr = BLOCK_SIZE // 2
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    x = tl.load(values + element, mask=element < n, other=0.0).to(tl.float32)

    largest = tl.max(tl.abs(x), axis=1)
    has_nan = tl.max((x != x).to(tl.int32), axis=1)
    tl.store(absmax + block, tl.where(has_nan > 0, float("nan"), largest), mask=block < n_blocks)

    inverse = tl.minimum(tl.div_rn(1.0, largest), _LARGEST)
    scaled = x * inverse[:, None]
    code = tl.zeros((BLOCKS, BLOCK_SIZE), dtype=tl.int32)
    for i in tl.static_range(15):
        code += (scaled > _THRESHOLDS[i]).to(tl.int32)

    high, low = tl.split(tl.reshape(code, (BLOCKS, HALF, 2)))
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    tl.store(packed + byte, ((high << 4) | low).to(tl.uint8), mask=byte < (n + 1) // 2)


@triton.jit
def dequantize_nf4_kernel(
    packed,  # uint8 [ceil(n / 2)]
    absmax,  # NESTED: uint8 codes [n_blocks]; else float32 [n_blocks]
    nested_absmax,  # NESTED: float32 [ceil(n_blocks / 256)]; else unused
    offset,  # NESTED: float32 []; else unused
    levels,  # float32 [16]
    dynamic_levels,  # NESTED: float32 [256]; else unused
    out,  # out: float16, bfloat16 or float32 [n]
    n,
    n_blocks,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    NESTED: tl.constexpr,
):
    """Write the values of BLOCKS blocks, finding each block's scale on the way."""
    HALF: tl.constexpr = BLOCK_SIZE // 2
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    scale = tl.load(absmax + block, mask=block < n_blocks, other=0)
    if NESTED:
        nested = tl.load(
            nested_absmax + block // _NESTED_BLOCK_SIZE, mask=block < n_blocks, other=0.0
        )
        scale = tl.load(dynamic_levels + scale.to(tl.int32)) * nested + tl.load(offset)

    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    codes = tl.load(packed + byte, mask=byte < (n + 1) // 2, other=0).to(tl.int32)
    high = tl.load(levels + (codes >> 4)) * scale[:, None]
    low = tl.load(levels + (codes & 0x0F)) * scale[:, None]

    element = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    values = tl.interleave(high, low).to(out.dtype.element_ty)
    tl.store(out + element, values, mask=element < n)
