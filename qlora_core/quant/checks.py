"""Checks of tensors at the operations' edge; kernels check nothing themselves."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn import Parameter

from qlora_core.errors import ConfigError, DtypeError, LayoutError, NonFiniteError
from qlora_core.quant.codebook import BLOCK_SIZES

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check_tensor(tensor: object, name: str) -> None:
    """Refuse what is no tensor; raises DtypeError."""
    if not isinstance(tensor, Tensor):
        raise DtypeError(f"{name} must be a tensor, not {type(tensor).__name__}")


def check_dtype(wanted: torch.dtype, **tensors: Tensor) -> None:
    """Refuse tensors of another dtype than ``wanted``; raises DtypeError."""
    for name, tensor in tensors.items():
        if tensor.dtype != wanted:
            raise DtypeError(f"{name} must be {wanted}, not {tensor.dtype}")


def check_float(dtype: torch.dtype, name: str) -> None:
    """Refuse any dtype but float16, bfloat16 and float32; raises DtypeError."""
    if dtype not in FLOATS:
        raise DtypeError(f"{name} must be float16, bfloat16 or float32, not {dtype}")


def check_values(tensor: Tensor, name: str) -> None:
    """Refuse a tensor that has no plain memory with values in it; raises LayoutError."""
    if tensor.layout != torch.strided:
        raise LayoutError(f"{name} must be dense, not {str(tensor.layout).removeprefix('torch.')}")
    if tensor.is_meta:
        raise LayoutError(f"{name} is on meta, where tensors hold no values")
    if isinstance(tensor, FakeTensor):
        raise LayoutError(f"{name} is fake: it holds no values")


def has_plain_memory(*tensors: Tensor | None) -> bool:
    """Tell whether what these tensors' memory holds is their values, which torch is not just tracing."""
    return not torch.compiler.is_compiling() and all(
        tensor is None or _is_plain(tensor) for tensor in tensors
    )


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, Parameter)
        and not tensor.is_neg()
        and not torch._is_functional_tensor(tensor)  # noqa: SLF001  # pyright: ignore[reportPrivateImportUsage] - there is no public way
    )


def check_surroundings() -> None:
    """Refuse to work where new tensors are not plain ones: tables that are kept would not be; raises LayoutError."""
    if not torch.compiler.is_compiling() and not _is_plain(torch.empty(0, device="cpu")):
        raise LayoutError(
            "new tensors are fake or wrapped here (FakeTensorMode, functionalize): NF4 needs their values"
        )


def check_layout(**tensors: Tensor) -> None:
    """Refuse tensors without values, not contiguous, or on different devices; raises LayoutError."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.device != first.device:
            raise LayoutError(
                f"{name} is on {tensor.device}, but {first_name} is on {first.device}"
            )
        check_values(tensor, name)
        if not tensor.is_contiguous():
            raise LayoutError(f"{name} must be contiguous")


def check_block_size(block_size: int) -> None:
    """Refuse a block size the format does not have; raises ConfigError."""
    if not isinstance(block_size, int) or block_size not in BLOCK_SIZES:
        raise ConfigError(
            f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, not {block_size}"
        )


def check_scales_finite(absmax: Tensor, name: str) -> None:
    """Refuse a tensor whose scales, none negative, show NaN or infinity in it; raises NonFiniteError."""
    # The largest is NaN where any is: one pass instead of four.
    if not math.isfinite(absmax.max().item()):
        raise NonFiniteError(f"{name} holds NaN or infinity; only finite weights can be quantized")
