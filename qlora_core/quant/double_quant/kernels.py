"""Triton kernel for double quantization. It checks nothing: `ops` does.

The way back has no kernel of its own: `nf4.kernels.dequantize_nf4_kernel` does it on the fly. Where a
program begins is a 64-bit number, as in every kernel here.
"""

import triton
import triton.language as tl

from qlora_core.quant.codebook import NESTED_BLOCK_SIZE

_NESTED_BLOCK_SIZE = tl.constexpr(NESTED_BLOCK_SIZE)
# The reciprocal of a block of zeros becomes this, so that the zeros stay zeros.
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit(do_not_specialize=["n"])
def quantize_absmax_kernel(
    absmax,  # float32 [n]
    offset,  # float32 []
    thresholds,  # float32 [255], ascending
    codes,  # out: uint8 [n]
    nested_absmax,  # out: float32 [ceil(n / 256)]
    n: tl.int64,
    BLOCKS: tl.constexpr,
):
    """Write the 8-bit codes and the nested scale of BLOCKS nested blocks."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    start = first * _NESTED_BLOCK_SIZE
    block = tl.arange(0, BLOCKS)
    scale = block[:, None] * _NESTED_BLOCK_SIZE + tl.arange(0, _NESTED_BLOCK_SIZE)[None, :]
    inside = scale < n - start
    # Outside the last block the distance from the mean is zero, as in the reference's padding.
    loaded = tl.load(absmax + start + scale, mask=inside, other=0.0)
    centred = tl.where(inside, loaded - tl.load(offset), 0.0)
    largest = tl.max(tl.abs(centred), axis=1)
    tl.store(nested_absmax + first + block, largest, mask=block * _NESTED_BLOCK_SIZE < n - start)
    scaled = centred * tl.minimum(tl.div_rn(1.0, largest), _LARGEST)[:, None]

    # Binary search: the code is the number of thresholds strictly below the value.
    code = tl.zeros((BLOCKS, _NESTED_BLOCK_SIZE), dtype=tl.int32)
    for power in tl.static_range(8):
        step = 128 >> power
        code += tl.where(scaled > tl.load(thresholds + code + (step - 1)), step, 0)
    tl.store(codes + start + scale, code.to(tl.uint8), mask=inside)
