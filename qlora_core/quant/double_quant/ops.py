"""Double quantization on any device: checks the tensors and picks the device's path.

CPU tensors take `cpu` (tables), others take `kernels` (Triton), whose module is only imported then;
both equal `reference` bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_core.errors import NonFiniteError, ShapeError
from qlora_core.quant.checks import check_dtype, check_layout, check_scales_finite
from qlora_core.quant.codebook import NESTED_BLOCK_SIZE
from qlora_core.quant.double_quant import cpu, reference
from qlora_core.quant.double_quant.launch import launch_quantize


def quantize_absmax(absmax: Tensor, *, name: str = "absmax") -> tuple[Tensor, Tensor, Tensor]:
    """Turn scales into 8-bit codes, nested scales and their mean.

    Args:
        absmax: float32 [blocks], contiguous.
        name: of the tensor, for error messages.

    Returns:
        codes uint8 [blocks], nested_absmax float32 [ceil(blocks / 256)], offset float32 [].

    Raises:
        DtypeError, LayoutError, ShapeError: ``absmax`` is not as described.
        NonFiniteError: it holds NaN or infinity, or its sum, which the mean needs, is beyond float32.

    Source: QLoRA, arXiv:2305.14314, section 3. Held bit for bit to `reference.quantize_absmax`.
    """
    check_dtype(torch.float32, absmax=absmax)
    check_layout(absmax=absmax)
    if absmax.dim() != 1 or absmax.numel() == 0:
        raise ShapeError(f"{name} must be one-dimensional and not empty, not {list(absmax.shape)}")
    on_cpu = absmax.device.type == "cpu"
    codes, nested_absmax, offset = (cpu.quantize_absmax if on_cpu else launch_quantize)(absmax)
    # It is not where a scale is not, either: one number tells of all.
    if not bool(torch.isfinite(offset)):
        check_scales_finite(absmax, name)
        raise NonFiniteError(
            f"the sum of {name} is beyond float32, so that it cannot be doubly quantized; "
            "double_quant=False takes it"
        )
    return codes, nested_absmax, offset


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """Turn 8-bit codes back into scales: ``map[code] * nested_absmax[i // 256] + offset``.

    Args:
        codes: uint8 [blocks].
        nested_absmax: float32 [ceil(blocks / 256)].
        offset: float32 [].

    Returns:
        float32 [blocks], new.

    Raises:
        DtypeError, LayoutError, ShapeError: an argument is not as described.
    """
    check_nested(codes, nested_absmax, offset)
    return reference.dequantize_absmax(codes, nested_absmax, offset)


def check_nested(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> None:
    """Refuse 8-bit scales whose parts do not belong together."""
    check_dtype(torch.uint8, codes=codes)
    check_dtype(torch.float32, nested_absmax=nested_absmax, offset=offset)
    check_layout(codes=codes, nested_absmax=nested_absmax, offset=offset)
    wanted = -(-codes.numel() // NESTED_BLOCK_SIZE)
    if nested_absmax.numel() != wanted:
        raise ShapeError(
            f"{codes.numel()} codes in blocks of {NESTED_BLOCK_SIZE} need {wanted} nested scales, "
            f"not {nested_absmax.numel()}"
        )
    if offset.numel() != 1:
        raise ShapeError(f"offset must be one number, not {list(offset.shape)}")
