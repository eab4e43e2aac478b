"""LoRA over a frozen linear layer, with its own backward pass.

``y = x W^T + bias + scaling * dropout(x) A^T B^T``. The graph keeps x and the small product
``dropout(x) A^T``; W is dequantized again for the backward pass and the dropout mask is drawn
again from its seed, so neither costs memory in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from qlora_core.nn.config import scaling_of
from qlora_core.nn.masters import apply_but_keep_float32
from qlora_core.nn.nf4_linear import NF4Linear, NoDenseWeight, product_dtype
from qlora_core.ops.working_copy import WorkingCopy
from qlora_core.quant import NF4Weight
from qlora_core.quant.workspace import dense

# transformers' own layers that multiply by a matrix and do nothing else, by module and class; importing them here would
# load transformers with every layer.
_CONV1D = ("transformers.pytorch_utils", "Conv1D")
_FALCON = ("transformers.models.falcon.modeling_falcon", "FalconLinear")

# Of A and of B, in the dtype of products.
_Copies = tuple[Tensor | None, Tensor | None]


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
        copies: _Copies,
    ) -> Tensor:
        seed = _draw_seed() if dropout > 0 else None
        x_product = x.to(dtype)
        a, b = _in_dtype(lora_A, lora_B, copies, dtype)
        down = _drop(x_product, dropout, seed) @ a.T  # [tokens, r]
        with dense(weight, dtype) as dense_weight:
            y = functional.linear(x_product, dense_weight, None if bias is None else bias.to(dtype))
        y.addmm_(down, b.T, alpha=scaling)

        ctx.save_for_backward(x, lora_A, lora_B, down)
        ctx.weight, ctx.dtype, ctx.copies = weight, dtype, copies
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
        a, b = _in_dtype(lora_A, lora_B, ctx.copies, dtype)
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
        return dx, d_a, d_b, None, None, None, None, None, None


def _in_dtype(
    lora_A: Tensor,  # noqa: N803
    lora_B: Tensor,  # noqa: N803
    copies: _Copies,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Give A and B in the dtype of products: their copies, or casts where there are none."""
    of_a, of_b = copies
    return lora_A.to(dtype) if of_a is None else of_a, lora_B.to(dtype) if of_b is None else of_b


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

    A and B stay in float32 when the model is cast to another dtype.

    Attributes:
        base: the frozen layer: `NF4Linear`, `torch.nn.Linear`, or one of transformers' that does the same
            (`targets.is_adaptable`).
        lora_A: float32 [r, in_features].
        lora_B: float32 [out_features, r].
        alpha: scale of the update before division by r, or by its root.
        use_rslora: whether the division is by the root.
        enabled: False while the base model alone should answer (`lora_disabled`).
        working_copies: of A and B, kept by an optimizer; products take them where they are in their
            dtype and nobody else has written to A or B since.

    Source: LoRA, arXiv:2106.09685, section 4.1; dropout as in PEFT, on the input of A.
    """

    def __init__(
        self,
        base: nn.Module,
        lora_A: Tensor,  # noqa: N803 - the field's name
        lora_B: Tensor,  # noqa: N803
        *,
        alpha: float,
        dropout: float,
        use_rslora: bool = False,
    ) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.alpha = alpha
        self.use_rslora = use_rslora
        self.dropout = dropout
        self.enabled = True
        self.working_copies: tuple[WorkingCopy, WorkingCopy] | None = None

    @property
    def scaling(self) -> float:
        """The factor on the update."""
        return scaling_of(self.r, self.alpha, use_rslora=self.use_rslora)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.lora_A.shape[1]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.lora_B.shape[0]

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
        base: Any = self.base
        if isinstance(base, NF4Linear):
            weight = base.nf4
        else:
            # GPT-2's linear layer keeps the transpose.
            weight = base.weight.detach().T if is_conv1d(base) else base.weight.detach()
        dtype = self.product_dtype(x.device)
        y = LoraLinearFn.apply(
            x.reshape(-1, self.in_features),
            self.lora_A,
            self.lora_B,
            base.bias,
            weight,
            self.scaling,
            self.dropout if self.training else 0.0,
            dtype,
            self._copies(dtype),
        )
        return y.view(*x.shape[:-1], self.out_features)  # pyright: ignore[reportAttributeAccessIssue]

    def product_dtype(self, device: torch.device) -> torch.dtype:
        """Give the dtype that the layer multiplies in on a device."""
        base: Any = self.base
        compute_dtype = base.compute_dtype if isinstance(base, NF4Linear) else base.weight.dtype
        return product_dtype(compute_dtype, device)

    def _copies(self, dtype: torch.dtype) -> _Copies:
        if self.working_copies is None:
            return None, None
        of_a, of_b = self.working_copies
        return of_a.of(self.lora_A, dtype), of_b.of(self.lora_B, dtype)

    def extra_repr(self) -> str:
        """Say the adapter's size."""
        return f"r={self.r}, scaling={self.scaling:g}, dropout={self.dropout}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoraLinear:
        """Move everything where ``fn`` moves things, but never cast A and B."""
        apply_but_keep_float32(self, lambda: super(LoraLinear, self)._apply(fn, recurse))
        return self


def is_adaptable(module: nn.Module) -> bool:
    """Whether the module computes ``x W^T + bias`` and nothing else, so that an update can be added beside it."""
    if isinstance(module, NF4Linear) or type(module) is nn.Linear:
        return True
    return _kind(module) in (_CONV1D, _FALCON)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Give (out_features, in_features) of a layer that can take an adapter."""
    if isinstance(module, NF4Linear):
        return module.out_features, module.in_features
    rows, columns = module.get_parameter("weight").shape
    return (columns, rows) if is_conv1d(module) else (rows, columns)


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is GPT-2's linear layer, which keeps its weight as [in_features, out_features]."""
    return _kind(module) == _CONV1D


def _kind(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__
