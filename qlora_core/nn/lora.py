"""LoRA over a frozen linear layer, with its own backward pass.

``y = x W^T + bias + scaling * dropout(x) A^T B^T``. The graph keeps x and the small product
``dropout(x) A^T``; W is dequantized again for the backward pass and the dropout mask is drawn
again from its seed, so neither costs memory in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from qlora_core.nn.nf4_linear import NF4Linear, NoDenseWeight, product_dtype
from qlora_core.quant import NF4Weight
from qlora_core.quant.workspace import dense


class LoraLinearFn(torch.autograd.Function):
    """The product above for 2-D x [tokens, in]; gradients for x, A and B only."""

    @staticmethod
    def forward(  # noqa: D102 - autograd's protocol
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        lora_A: Tensor,  # noqa: N803 - the field's name
        lora_B: Tensor,  # noqa: N803
        bias: Tensor | None,
        weight: NF4Weight | Tensor,
        scaling: float,
        dropout: float,
        dtype: torch.dtype,
    ) -> Tensor:
        seed = _draw_seed() if dropout > 0 else None
        x_product = x.to(dtype)
        down = _drop(x_product, dropout, seed) @ lora_A.to(dtype).T  # [tokens, r]
        with dense(weight, dtype) as dense_weight:
            y = functional.linear(x_product, dense_weight, None if bias is None else bias.to(dtype))
        y.addmm_(down, lora_B.to(dtype).T, alpha=scaling)

        ctx.save_for_backward(x, lora_A, lora_B, down)
        ctx.weight, ctx.dtype = weight, dtype
        ctx.scaling, ctx.dropout, ctx.seed = scaling, dropout, seed
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # noqa: D102  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, down = ctx.saved_tensors  # noqa: N806
        dtype = ctx.dtype
        grad = grad.to(dtype)
        a, b = lora_A.to(dtype), lora_B.to(dtype)
        grad_down = (grad @ b).mul_(ctx.scaling)  # [tokens, r]

        d_a = d_b = dx = None
        if ctx.needs_input_grad[1]:
            d_a = (grad_down.T @ _drop(x.to(dtype), ctx.dropout, ctx.seed)).to(lora_A.dtype)
        if ctx.needs_input_grad[2]:
            d_b = (grad.T @ down).mul_(ctx.scaling).to(lora_B.dtype)
        if ctx.needs_input_grad[0]:
            with dense(ctx.weight, dtype) as dense_weight:
                dx = grad @ dense_weight
            if ctx.seed is None:
                dx.addmm_(grad_down, a)
            else:
                # A dropped input got nothing through, so the same mask stops its gradient.
                dx += _drop(grad_down @ a, ctx.dropout, ctx.seed)
            dx = dx.to(x.dtype)
        return dx, d_a, d_b, None, None, None, None, None


def _draw_seed() -> int:
    """Draw a mask's seed from the CPU's global generator, which checkpointing replays."""
    return int(torch.randint(2**62, (), device="cpu"))


def _drop(values: Tensor, dropout: float, seed: int | None) -> Tensor:
    """Zero a random part of ``values`` and scale up the rest; the same part for the same seed."""
    if seed is None:
        return values
    generator = torch.Generator(device=values.device).manual_seed(seed)
    kept = torch.empty_like(values).bernoulli_(1 - dropout, generator=generator)
    return kept.mul_(values).mul_(1 / (1 - dropout))


class LoraLinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update beside it.

    Attributes:
        base: the frozen layer.
        lora_A: float32 [r, in_features].
        lora_B: float32 [out_features, r].
        scaling: alpha / r.
        enabled: False while the base model alone should answer (`lora_disabled`).

    Source: LoRA, arXiv:2106.09685, section 4.1; dropout as in PEFT, on the input of A.
    """

    def __init__(
        self,
        base: NF4Linear | nn.Linear,
        lora_A: Tensor,  # noqa: N803 - the field's name
        lora_B: Tensor,  # noqa: N803
        *,
        scaling: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.scaling = scaling
        self.dropout = dropout
        self.enabled = True

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.base.out_features

    @property
    def r(self) -> int:
        """Rank of the update."""
        return self.lora_A.shape[0]

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        """Refuse ``weight`` with a sentence; everything else as usual."""
        if name == "weight":
            raise NoDenseWeight
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in_features] to [..., out_features], in the dtype of x."""
        if not self.enabled:
            return self.base(x)
        weight = self.base.nf4 if isinstance(self.base, NF4Linear) else self.base.weight.detach()
        compute_dtype = (
            self.base.compute_dtype if isinstance(self.base, NF4Linear) else self.base.weight.dtype
        )
        y = LoraLinearFn.apply(
            x.reshape(-1, self.in_features),
            self.lora_A,
            self.lora_B,
            self.base.bias,
            weight,
            self.scaling,
            self.dropout if self.training else 0.0,
            product_dtype(compute_dtype, x.device),
        )
        return y.view(*x.shape[:-1], self.out_features)  # pyright: ignore[reportAttributeAccessIssue]

    def extra_repr(self) -> str:
        """Say the adapter's size."""
        return f"r={self.r}, scaling={self.scaling}, dropout={self.dropout}"
