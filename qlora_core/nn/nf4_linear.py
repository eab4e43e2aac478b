"""NF4Linear: a frozen linear layer whose weight is stored in NF4.

The dense weight exists only inside one matrix product; the backward pass dequantizes again. Only
the input gets a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from qlora_core.errors import ModelUnsupported, ShapeError
from qlora_core.quant import NF4Weight
from qlora_core.quant.workspace import dense


def product_dtype(compute_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Give the dtype to multiply in: on CPUs float32, where 16-bit products are many times slower."""
    return torch.float32 if device.type == "cpu" else compute_dtype


class NoDenseWeight(ModelUnsupported, AttributeError):
    """Some code asked a quantized or adapted layer for its dense weight, instead of calling it."""

    def __init__(self) -> None:
        super().__init__(
            "the model reads the weight of a linear layer directly, which goes past its quantization "
            "and its adapter; such a model cannot be trained here"
        )


class NF4LinearFn(torch.autograd.Function):
    """``y = x W^T + bias`` with a quantized, frozen W. Saves nothing but references to W's codes."""

    @staticmethod
    def forward(  # noqa: D102 - autograd's protocol
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        bias: Tensor | None,
        weight: NF4Weight,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.weight, ctx.dtype, ctx.x_dtype = weight, dtype, x.dtype
        with dense(weight, dtype) as dense_weight:
            y = functional.linear(
                x.to(dtype), dense_weight, None if bias is None else bias.to(dtype)
            )
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # noqa: D102  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401
        grad: Tensor,
    ) -> tuple[Tensor, None, None, None]:
        with dense(ctx.weight, ctx.dtype) as dense_weight:
            dx = grad.to(ctx.dtype) @ dense_weight
        return dx.to(ctx.x_dtype), None, None, None


class NF4Linear(nn.Module):
    """A frozen linear layer over an `NF4Weight`.

    The weight's tensors are buffers, so they move with the module; its float32 scales stay float32
    whatever dtype the model is cast to.

    Args:
        weight: of shape [out_features, in_features].
        bias: [out_features] or None; frozen as well.
        compute_dtype: of the matrix product on a GPU (a CPU multiplies in float32).

    Raises:
        ShapeError: the weight is no matrix, or the bias does not fit it.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self, weight: NF4Weight, bias: Tensor | None = None, *, compute_dtype: torch.dtype
    ) -> None:
        super().__init__()
        if len(weight.shape) != 2:
            raise ShapeError(f"a linear layer needs a matrix, not shape {list(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise ShapeError(f"bias must be [{self.out_features}], not {list(bias.shape)}")
        self.compute_dtype = compute_dtype
        self.block_size = weight.block_size
        self.original_dtype = weight.dtype
        self.register_buffer("packed", weight.packed)
        self.register_buffer("absmax", weight.absmax)
        self.register_buffer("nested_absmax", weight.nested_absmax)
        self.register_buffer("offset", weight.offset)
        frozen = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", frozen)

    @property
    def nf4(self) -> NF4Weight:
        """The quantized weight; its tensors are this module's buffers, not copies."""
        return NF4Weight(
            packed=self.packed,
            absmax=self.absmax,
            nested_absmax=self.nested_absmax,
            offset=self.offset,
            shape=torch.Size((self.out_features, self.in_features)),
            block_size=self.block_size,
            dtype=self.original_dtype,
        )

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        """Refuse ``weight`` with a sentence; everything else as usual."""
        if name == "weight":
            raise NoDenseWeight
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in_features] to [..., out_features], in the dtype of x."""
        dtype = product_dtype(self.compute_dtype, x.device)
        return NF4LinearFn.apply(x, self.bias, self.nf4, dtype)  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        """Say the layer's size and storage."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, block_size={self.block_size}, "
            f"double_quant={self.nested_absmax is not None}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        """Move the buffers where ``fn`` moves things, but never cast the scales."""
        scales = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in scales.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self
