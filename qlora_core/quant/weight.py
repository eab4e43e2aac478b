"""NF4Weight: one quantized weight matrix, its codes and scales together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from qlora_core.errors import ConfigError
from qlora_core.quant import bitsandbytes
from qlora_core.quant.checks import check_tensor
from qlora_core.quant.devices import check_device
from qlora_core.quant.double_quant import ops as scale_ops
from qlora_core.quant.nf4 import ops as code_ops
from qlora_core.quant.scale_search import improve_scales


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A tensor in NF4, with its scales in float32 or, doubly quantized, in 8 bits.

    Attributes:
        packed: uint8 [ceil(n / 2)]; element 2j sits in the high nibble of byte j.
        absmax: one scale per block, [ceil(n / block_size)]: float32, or uint8 codes when doubly
            quantized.
        nested_absmax: float32 [ceil(blocks / 256)], or None when not doubly quantized.
        offset: float32 [], the mean of the scales, or None when not doubly quantized.
        shape: of the dense tensor, row-major; n elements.
        block_size: elements per scale.
        dtype: of the tensor this was made from.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    shape: torch.Size
    block_size: int
    dtype: torch.dtype

    @property
    def double_quant(self) -> bool:
        """Whether the scales are themselves quantized."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        parts = (self.packed, self.absmax, self.nested_absmax, self.offset)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def bits_per_parameter(self) -> float:
        """Bits per element of the dense tensor, scales included."""
        return 8 * self.nbytes / self.shape.numel()

    def scales(self) -> Tensor:
        """Give the scales as float32 [blocks]; newly made when doubly quantized."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax
        return scale_ops.dequantize_absmax(self.absmax, self.nested_absmax, self.offset)

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """Give the dense tensor back.

        Args:
            dtype: float16, bfloat16 or float32; that of ``out`` or of the original when None.
            out: where to write: a contiguous tensor of n elements on the same device.

        Returns:
            dtype, of the original shape; a view of ``out`` if that was given.

        Raises:
            DtypeError, LayoutError, ShapeError: ``dtype`` or ``out`` is not as described.
        """
        if out is not None:
            check_tensor(out, "out")
        dtype = dtype or (self.dtype if out is None else out.dtype)
        n = self.shape.numel()
        flat = code_ops.dequantize_nf4(
            self.packed,
            self.absmax,
            self.nested_absmax,
            self.offset,
            n=n,
            block_size=self.block_size,
            dtype=dtype,
            out=out,
        )
        return flat.view(self.shape)

    def to(self, device: torch.device | str) -> NF4Weight:
        """Give the same weight on another device; itself when it is there already.

        Raises:
            ConfigError: ``device`` is none, meta, or not on this machine.
        """
        target = check_device(device)
        packed = self.packed.to(target)
        others = (self.absmax, self.nested_absmax, self.offset)
        if packed is self.packed and all(
            part is None or part.device == packed.device for part in others
        ):
            return self
        return replace(
            self,
            packed=packed,
            absmax=self.absmax.to(target),
            nested_absmax=None if self.nested_absmax is None else self.nested_absmax.to(target),
            offset=None if self.offset is None else self.offset.to(target),
        )

    def to_bitsandbytes(self, name: str) -> dict[str, Tensor]:
        """Give the tensors in which bitsandbytes keeps this weight in a checkpoint, by key.

        Args:
            name: the weight's own key, such as ``model.layers.0.mlp.up_proj.weight``; the other keys begin with it.

        Returns:
            ``name`` uint8 [ceil(n / 2), 1] and the tensors beside it, on this weight's device. Codes and scales share
            this weight's memory.

        Source: bitsandbytes 0.50.2, ``QuantState.as_dict(packed=True)``; docs/formats/bitsandbytes.md.
        """
        return bitsandbytes.write(self, name)

    @classmethod
    def from_bitsandbytes(cls, tensors: Mapping[str, Tensor], name: str) -> NF4Weight:
        """Take a weight from the tensors of a checkpoint that bitsandbytes (or `to_bitsandbytes`) wrote.

        Args:
            tensors: by key; those that do not begin with ``name`` are not looked at. The codes may be stored as
                float16, bfloat16 or float32 (``bnb_4bit_quant_storage``).
            name: the weight's own key.

        Returns:
            The weight, in the memory of the tensors given.

        Raises:
            ModelWeightsInvalid: a tensor is missing, one too many, or of a wrong dtype, length or content.
            ModelUnsupported: the weight is not in NF4, or in a form of it that bitsandbytes does not write.
        """
        return cls(*bitsandbytes.read(tensors, name))


def quantize_nf4(
    weight: Tensor,
    *,
    block_size: int = 64,
    double_quant: bool = True,
    scale: Literal["absmax", "mse"] = "absmax",
    name: str = "weight",
) -> NF4Weight:
    """Quantize a tensor to NF4.

    Args:
        weight: float16, bfloat16 or float32, any shape, all finite.
        block_size: elements per scale, a power of two from 32 to 4096.
        double_quant: whether the scales become 8-bit codes too (4.127 bits per parameter instead
            of 4.5 at block size 64).
        scale: "absmax" gives the format as everybody writes it; "mse" searches for each block the
            scale with the least squared error, in the same format (`scale_search`). Of the largest
            float16 numbers, "absmax" with double quantization may come back infinite in float16.
        name: of the tensor, for error messages.

    Returns:
        The quantized weight, on the device of ``weight``.

    Raises:
        ConfigError, DtypeError, LayoutError, ShapeError: an argument is not as described.
        NonFiniteError: the weight holds NaN or infinity.

    Source: QLoRA, arXiv:2305.14314, section 3. The format is described in docs/formats/nf4.md.
    """
    if scale not in ("absmax", "mse"):
        raise ConfigError(f'scale must be "absmax" or "mse", not {scale!r}')
    check_tensor(weight, name)
    packed, absmax = code_ops.quantize_nf4(weight, block_size=block_size, name=name)
    nested_absmax = offset = None
    if double_quant:
        absmax, nested_absmax, offset = scale_ops.quantize_absmax(absmax, name=f"absmax of {name}")
    if scale == "mse":
        packed, absmax = improve_scales(
            weight, packed, absmax, nested_absmax, offset, block_size=block_size
        )
    return NF4Weight(packed, absmax, nested_absmax, offset, weight.shape, block_size, weight.dtype)
