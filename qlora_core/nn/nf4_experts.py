"""A mixture's experts in NF4: the stack of their matrices, and the layer's product over it.

transformers holds the matrices of a layer's experts in one three-dimensional parameter. Here each expert's is quantized
for itself, so that a product makes no more than one of them dense, and the backward pass makes it dense again. Only the
input gets a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_core.errors import ShapeError
from qlora_core.nn.nf4_linear import NF4LinearFn, product_dtype
from qlora_core.quant import NF4Weight

_PARTS = ("packed", "absmax", "nested_absmax", "offset")


class NF4Stack(nn.Module):
    """The weights of several linear layers of one shape, frozen, each an `NF4Weight` of its own.

    The stacked tensors are buffers, so they move with the module; float32 scales stay float32 whatever dtype the model is
    cast to.

    Args:
        weights: one per expert, each of shape [out_features, in_features] and stored alike. They are copied as they come,
            so that an iterator need not hold two of them at once.
        count: how many there are.
        compute_dtype: of the matrix product on a GPU (a CPU multiplies in float32).

    Raises:
        ShapeError: there are no weights, not ``count`` of them, or they are not alike.
    """

    packed: Tensor  # uint8 [experts, bytes]
    absmax: Tensor  # [experts, blocks]
    nested_absmax: Tensor | None  # float32 [experts, nested blocks]
    offset: Tensor | None  # float32 [experts]

    def __init__(
        self, weights: Iterable[NF4Weight], count: int, *, compute_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        kind, filled = None, 0
        for one in weights:
            if kind is None:
                kind = _kind_of(one)
                self._make_room(one, count)
            if filled == count or _kind_of(one) != kind:
                raise ShapeError(f"a stack needs {count} matrices of one kind")
            for name in _PARTS:
                part = getattr(one, name)
                if part is not None:
                    getattr(self, name)[filled] = part
            filled += 1
        if kind is None or filled != count:
            raise ShapeError(f"a stack needs {count} matrices of one kind, not {filled}")

    def _make_room(self, like: NF4Weight, count: int) -> None:
        if len(like.shape) != 2:
            raise ShapeError(f"a stack needs matrices of one kind, not shape {list(like.shape)}")
        self.out_features, self.in_features = like.shape
        self.block_size, self.original_dtype = like.block_size, like.dtype
        for name in _PARTS:
            part = getattr(like, name)
            self.register_buffer(name, None if part is None else part.new_empty(count, *part.shape))

    def __len__(self) -> int:
        """How many experts there are."""
        return len(self.packed)

    def nf4(self, expert: int) -> NF4Weight:
        """Give one expert's weight; its tensors are views of this module's buffers."""
        return NF4Weight(
            packed=self.packed[expert],
            absmax=self.absmax[expert],
            nested_absmax=None if self.nested_absmax is None else self.nested_absmax[expert],
            offset=None if self.offset is None else self.offset[expert],
            shape=torch.Size((self.out_features, self.in_features)),
            block_size=self.block_size,
            dtype=self.original_dtype,
        )

    def apply_expert(self, expert: int, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map x [tokens, in_features] by one expert to [tokens, out_features], in the dtype of x."""
        dtype = product_dtype(self.compute_dtype, x.device)
        return NF4LinearFn.apply(x, bias, self.nf4(expert), dtype)  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        """Say the stack's size and storage."""
        return (
            f"experts={len(self)}, in_features={self.in_features}, out_features={self.out_features}, "
            f"block_size={self.block_size}, double_quant={self.nested_absmax is not None}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Stack:
        """Move the buffers where ``fn`` moves things, but never cast the scales."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self


def _kind_of(weight: NF4Weight) -> tuple[torch.Size, int, torch.dtype, bool]:
    return weight.shape, weight.block_size, weight.dtype, weight.double_quant


def experts_forward(
    experts: Any,  # noqa: ANN401 - a family's own module
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Send every token through its experts, one expert at a time.

    Written for transformers' experts interface: ``experts`` is a module under its ``use_experts_implementation``, whose
    attributes say how an expert computes. Its matrices are `NF4Stack`s, or still parameters where they were skipped.

    Args:
        experts: the family's own module.
        hidden_states: [tokens, hidden].
        top_k_index: int64 [tokens, k], each token's experts.
        top_k_weights: [tokens, k], what their results count.

    Returns:
        [tokens, hidden], in the dtype of ``hidden_states``.

    Source: transformers 5.23, ``integrations/moe.py``, the contract of ``ALL_EXPERTS_FUNCTIONS``.
    """
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    out = torch.zeros_like(hidden_states)
    k = top_k_index.shape[-1]
    chosen, order = torch.sort(top_k_index.reshape(-1), stable=True)
    # The one place that waits for the device: how many rows each expert gets.
    hits, counts = torch.unique_consecutive(chosen, return_counts=True)
    rows_of = order.split(counts.tolist())
    for expert, rows in zip(hits.tolist(), rows_of, strict=True):
        tokens = rows // k
        x = _product(experts, up_name, expert, hidden_states[tokens])
        x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)  # noqa: SLF001 - the contract's
        x = _product(experts, "down_proj", expert, x)
        if getattr(experts, "has_post_expert_norm", False):  # transformers 5.17 has no such norm
            x = experts.post_expert_norm(x)
        x = x * top_k_weights.reshape(-1)[rows, None]
        out.index_add_(0, tokens, x.to(out.dtype))
    return out


def _product(experts: Any, name: str, expert: int, x: Tensor) -> Tensor:  # noqa: ANN401
    weight = getattr(experts, name)
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    if isinstance(weight, NF4Stack):
        return weight.apply_expert(expert, x, bias)
    dense = weight[expert].T if experts.is_transposed else weight[expert]
    return functional.linear(x, dense, bias)
