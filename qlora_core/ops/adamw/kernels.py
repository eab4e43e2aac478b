"""Triton kernels for AdamW over flat buffers of whole tiles. They check nothing: `ops` does.

Every element is read and written once. A step whose gradient is not finite is told by a scalar that
is NaN, so that the host need not wait to know. Where a program begins is a 64-bit number.
"""

import triton
import triton.language as tl

from qlora_core.ops.adamw import codes as tables
from qlora_core.ops.adamw import settings

_BLOCK_SIZE = tl.constexpr(settings.BLOCK_SIZE)
_LOWEST_HALF = tl.constexpr(tables.LOWEST_HALF)
_HIGHEST_HALF = tl.constexpr(tables.HIGHEST_HALF)
_HALVES = tl.constexpr(tables.HALVES)
# The reciprocal of a block of zeros becomes this, so that the zeros stay zeros.
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def adamw_32_kernel(
    values,  # in, out: float32 [n]
    gradients,  # float32 [n]
    mean,  # in, out: float32 [n]
    square,  # in, out: float32 [n]
    copies,  # out: float16 or bfloat16 [n], or None
    scalars,  # float32 [3]
    decay,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    TILE: tl.constexpr,
):
    """Update TILE elements with moments in float32."""
    factor = tl.load(scalars + 2)
    if factor == factor:
        place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        updated, first, second = _updated(
            tl.load(values + place),
            tl.load(gradients + place) * factor,
            tl.load(mean + place),
            tl.load(square + place),
            scalars,
            decay,
            beta1,
            one_minus_beta1,
            beta2,
            one_minus_beta2,
            eps,
        )
        tl.store(values + place, updated)
        if copies is not None:
            tl.store(copies + place, updated.to(copies.dtype.element_ty))
        tl.store(mean + place, first)
        tl.store(square + place, second)


@triton.jit
def adamw_8_kernel(
    values,  # in, out: float32 [n]
    gradients,  # float32 [n]
    mean,  # in, out: uint8 [n]
    square,  # in, out: uint8 [n]
    mean_absmax,  # in, out: float32 [n / 256]
    square_absmax,  # in, out: float32 [n / 256]
    mean_levels,  # float32 [256]
    mean_thresholds,  # float32 [256]
    mean_table,  # uint8 [2 * HALVES]
    square_levels,  # float32 [256]
    square_thresholds,  # float32 [256]
    square_table,  # uint8 [2 * HALVES]
    copies,  # out: float16 or bfloat16 [n], or None
    scalars,  # float32 [3]
    decay,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    TILE: tl.constexpr,
):
    """Update TILE elements, a multiple of 256, with moments in 8 bits."""
    factor = tl.load(scalars + 2)
    if factor == factor:
        BLOCKS: tl.constexpr = TILE // _BLOCK_SIZE
        first_block = tl.program_id(0).to(tl.int64) * BLOCKS
        block = first_block + tl.arange(0, BLOCKS)
        place = block[:, None] * _BLOCK_SIZE + tl.arange(0, _BLOCK_SIZE)[None, :]
        old_mean = tl.load(mean_levels + tl.load(mean + place).to(tl.int32))
        old_square = tl.load(square_levels + tl.load(square + place).to(tl.int32))
        updated, first, second = _updated(
            tl.load(values + place),
            tl.load(gradients + place) * factor,
            old_mean * tl.load(mean_absmax + block)[:, None],
            old_square * tl.load(square_absmax + block)[:, None],
            scalars,
            decay,
            beta1,
            one_minus_beta1,
            beta2,
            one_minus_beta2,
            eps,
        )
        tl.store(values + place, updated)
        if copies is not None:
            tl.store(copies + place, updated.to(copies.dtype.element_ty))

        largest = tl.max(tl.abs(first), axis=1)
        tl.store(mean_absmax + block, largest)
        code = _nearest(first, largest, mean_thresholds, mean_table)
        tl.store(mean + place, code.to(tl.uint8))

        largest = tl.max(second, axis=1)
        tl.store(square_absmax + block, largest)
        code = _nearest(second, largest, square_thresholds, square_table)
        # What is above zero stays so: see the reference.
        tl.store(square + place, tl.maximum(code, (second > 0).to(tl.int32)).to(tl.uint8))


@triton.jit
def _updated(
    value,
    gradient,
    mean,
    square,
    scalars,
    decay,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
):
    """Give new values and moments."""
    mean = mean * beta1 + gradient * one_minus_beta1
    square = square * beta2 + gradient * gradient * one_minus_beta2
    root = tl.sqrt_rn(square) * tl.load(scalars + 1) + eps
    return value * decay - tl.div_rn(mean, root) * tl.load(scalars), mean, square


@triton.jit
def _nearest(moment, largest, thresholds, table):
    """Give the int32 codes of the levels nearest to a moment [BLOCKS, 256] over its scales [BLOCKS]."""
    scaled = moment * tl.minimum(tl.div_rn(1.0, largest), _LARGEST)[:, None]
    bits = scaled.to(tl.int32, bitcast=True)
    half = (bits >> 16) & 0x7FFF
    half = tl.minimum(tl.maximum(half, _LOWEST_HALF), _HIGHEST_HALF) - _LOWEST_HALF
    code = tl.load(table + half + tl.where(bits < 0, _HALVES, 0)).to(tl.int32)
    return code + (scaled > tl.load(thresholds + code)).to(tl.int32)
