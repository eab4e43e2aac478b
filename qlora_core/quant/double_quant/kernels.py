"""Triton kernel for double quantization. It checks nothing: `ops` does.

The way back has no kernel of its own: `nf4.kernels.dequantize_nf4_kernel` does it on the fly.
"""

import triton
import triton.language as tl

_NESTED_BLOCK_SIZE = tl.constexpr(256)
# The reciprocal of a block of zeros becomes this, so that the zeros stay zeros.
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def quantize_absmax_kernel(
    absmax,  # float32 [n]
    offset,  # float32 []
    thresholds,  # float32 [255], ascending
    codes,  # out: uint8 [n]
    nested_absmax,  # out: float32 [ceil(n / 256)]
    n,
    n_nested,
    BLOCKS: tl.constexpr,
):
    """Write the 8-bit codes and the nested scale of BLOCKS nested blocks."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    scale = block[:, None] * _NESTED_BLOCK_SIZE + tl.arange(0, _NESTED_BLOCK_SIZE)[None, :]
    inside = scale < n
    # Outside the last block the distance from the mean is zero, as in the reference's padding.
    centred = tl.where(
        inside, tl.load(absmax + scale, mask=inside, other=0.0) - tl.load(offset), 0.0
    )
    largest = tl.max(tl.abs(centred), axis=1)
    tl.store(nested_absmax + block, largest, mask=block < n_nested)
    scaled = centred * tl.minimum(tl.div_rn(1.0, largest), _LARGEST)[:, None]

    # Binary search: the code is the number of thresholds strictly below the value.
    code = tl.zeros((BLOCKS, _NESTED_BLOCK_SIZE), dtype=tl.int32)
    for power in tl.static_range(8):
        step = 128 >> power
        code += tl.where(scaled > tl.load(thresholds + code + (step - 1)), step, 0)
    tl.store(codes + scale, code.to(tl.uint8), mask=inside)
