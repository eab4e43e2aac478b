"""Mends Triton's interpreter, so that kernels on CPU tensors give what a GPU gives.

It truncates on the way from float32 to bfloat16, where a GPU rounds to the nearest even value; it
loses subnormal numbers on the way back; and its `tl.dot` multiplies raw bits of bfloat16 operands.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_mended = False


def mend() -> None:
    """Patch the interpreter's builder, once per process."""
    global _mended  # noqa: PLW0603 - patching twice would wrap the patch
    if _mended:
        return
    _mended = True
    builder: Any = InterpreterBuilder
    cast, fp_to_fp, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot

    def mended_cast(self: Any, src: Any, dst_type: Any) -> Any:
        mended = _cast_bfloat16(src, dst_type)
        return cast(self, src, dst_type) if mended is None else mended

    def mended_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        mended = _cast_bfloat16(src, dst_type)
        return fp_to_fp(self, src, dst_type, rounding_mode) if mended is None else mended

    def mended_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = [_cast_bfloat16(operand, tl.float32) or operand for operand in (a, b)]
        return dot(self, *wide, *rest)

    builder.cast_impl = mended_cast
    builder.create_fp_to_fp = mended_fp_to_fp
    builder.create_dot = mended_dot


def _cast_bfloat16(src: Any, dst_type: Any) -> TensorHandle | None:
    """Cast between float32 and bfloat16 (which the interpreter keeps as uint16); else None."""
    pair = (src.dtype.scalar, dst_type.scalar)
    if pair == (tl.float32, tl.bfloat16):
        bits = src.data.astype(np.float32).view(np.uint32)
        rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return TensorHandle(
            np.where(np.isnan(src.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16
        )
    if pair == (tl.bfloat16, tl.float32):
        return TensorHandle((src.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
    return None
