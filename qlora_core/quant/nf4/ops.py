"""NF4 on any device: checks the tensors and picks the device's path.

CPU tensors take `cpu` (tables), others take `kernels` (Triton), whose module is only imported then;
both equal `reference` bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_core.errors import LayoutError, ShapeError
from qlora_core.quant import memory
from qlora_core.quant.checks import (
    check_block_size,
    check_dtype,
    check_float,
    check_layout,
    check_scales_finite,
    check_surroundings,
    check_values,
)
from qlora_core.quant.double_quant.ops import check_nested
from qlora_core.quant.nf4 import cpu
from qlora_core.quant.nf4.launch import launch_dequantize, launch_quantize


def quantize_nf4(
    values: Tensor, *, block_size: int = 64, name: str = "values"
) -> tuple[Tensor, Tensor]:
    """Turn floats into NF4 codes and one scale per block of consecutive elements.

    Args:
        values: float16, bfloat16 or float32 of any shape, n elements taken row-major.
        block_size: 32 to 4096, a power of two; the last block may be short.
        name: of the tensor, for error messages.

    Returns:
        packed uint8 [ceil(n / 2)], element 2j in the high nibble of byte j; absmax float32
        [ceil(n / block_size)]. Both new, on the device of ``values``.

    Raises:
        ConfigError: the block size is not one of the format's.
        DtypeError: the values are not float16, bfloat16 or float32.
        LayoutError: they are sparse, fake, or on the meta device.
        NonFiniteError: they hold NaN or infinity.
        ShapeError: there are none.

    Source: QLoRA, arXiv:2305.14314, section 3. Held bit for bit to `reference.quantize_nf4`.
    """
    check_surroundings()
    check_float(values.dtype, name)
    check_values(values, name)
    check_block_size(block_size)
    if values.numel() == 0:
        raise ShapeError(f"{name} of shape {list(values.shape)} has no elements")
    flat = values.detach().reshape(-1)
    if flat.device.type == "cpu":
        return cpu.quantize_nf4(flat, block_size=block_size, name=name)
    packed, absmax = launch_quantize(flat, block_size=block_size)
    check_scales_finite(absmax, name)
    return packed, absmax


def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    n: int,
    block_size: int = 64,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Turn NF4 codes back into floats: ``out[i] = level[code[i]] * scale[i // block_size]``.

    Args:
        packed: uint8 [ceil(n / 2)].
        absmax: one per block, [ceil(n / block_size)]: float32 scales, or their uint8 codes when
            doubly quantized.
        nested_absmax: float32 [ceil(blocks / 256)] when doubly quantized, else None.
        offset: float32 [] when doubly quantized, else None.
        n: number of elements.
        block_size: elements per scale.
        dtype: of the result: float16, bfloat16 or float32.
        out: where to write, dtype, n elements, contiguous, beside ``packed``; newly allocated when
            None.

    Returns:
        dtype [n]: ``out``, flattened.

    Raises:
        ConfigError, DtypeError, LayoutError, ShapeError: an argument is not as described.

    Source: QLoRA, arXiv:2305.14314, section 3. Held bit for bit to the two `reference` modules,
    one after the other.
    """
    check_surroundings()
    _check_codes(packed, absmax, n=n, block_size=block_size)
    if nested_absmax is not None and offset is not None:
        check_nested(absmax, nested_absmax, offset)
    else:
        check_dtype(torch.float32, absmax=absmax)
    flat_out = _prepare_out(out, n=n, dtype=dtype, beside=packed)
    if packed.device.type != "cpu":
        launch_dequantize(packed, absmax, nested_absmax, offset, flat_out, block_size=block_size)
        return flat_out
    cpu.dequantize_nf4_into(packed, absmax, nested_absmax, offset, flat_out, block_size=block_size)
    return flat_out


def _check_codes(packed: Tensor, absmax: Tensor, *, n: int, block_size: int) -> None:
    """Refuse codes and scales that do not belong to n elements in blocks of ``block_size``."""
    check_dtype(torch.uint8, packed=packed)
    check_block_size(block_size)
    check_layout(packed=packed, absmax=absmax)
    if packed.numel() != (n + 1) // 2:
        raise ShapeError(f"{n} codes need {(n + 1) // 2} bytes, but packed has {packed.numel()}")
    if absmax.numel() != -(-n // block_size):
        raise ShapeError(f"{n} codes in blocks of {block_size}, but {absmax.numel()} scales")


def _prepare_out(out: Tensor | None, *, n: int, dtype: torch.dtype, beside: Tensor) -> Tensor:
    """Give a checked, flat ``out`` of n elements, or a new one on the device of ``beside``."""
    check_float(dtype, "dtype")
    if out is None and beside.device.type == "cpu":
        return memory.empty(n, dtype)
    if out is None:
        return torch.empty(n, dtype=dtype, device=beside.device)
    check_dtype(dtype, out=out)
    check_layout(packed=beside, out=out)
    if out.numel() != n:
        raise ShapeError(f"out has {out.numel()} elements, but there are {n} codes")
    if out.requires_grad:
        raise LayoutError("out must not require a gradient: it is written in place")
    return out.view(-1)
