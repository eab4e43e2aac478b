"""Puts checkpoint tensors into a skeleton, each in its final form: quantized, or cast and moved."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from qlora_core.errors import ModelUnsupported, ModelWeightsInvalid, NonFiniteError
from qlora_core.models.choice import EXPERT_STACKS, Choice, is_plain_linear
from qlora_core.nn.nf4_experts import NF4Stack, experts_forward
from qlora_core.nn.nf4_linear import NF4Linear
from qlora_core.quant import NF4Weight
from qlora_core.quant.checks import FLOATS

_EXPERTS_IMPLEMENTATION = "nf4"


class Filling:
    """Puts tensors into a skeleton, each in its final form.

    Args:
        model: with its parameters on the meta device.
        device: where everything goes.
        compute_dtype: of the products with what is quantized.
        choice: what is quantized; None: nothing but what the checkpoint has in NF4.
        quantize: makes a weight's NF4 of a dense tensor, given its ``name``.
        keep_nf4: whether what the checkpoint has in NF4 stays so; else it becomes dense.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        compute_dtype: torch.dtype,
        choice: Choice | None,
        quantize: Callable[..., NF4Weight],
        *,
        keep_nf4: bool,
    ) -> None:
        self._model = model
        self._device = device
        self._compute_dtype = compute_dtype
        self._linears = frozenset() if choice is None else choice.linears
        self._experts = frozenset() if choice is None else choice.experts
        for path in self._experts:
            use_nf4_experts(model.get_submodule(path))
        self._quantize = quantize
        self._keep_nf4 = keep_nf4
        self._wanted = dict(model.state_dict())
        self._float32 = _patterns_kept_in_float32(model, compute_dtype)

    @property
    def wanted(self) -> set[str]:
        """The names of all parameters and saved buffers of the architecture."""
        return set(self._wanted)

    def put(self, name: str, tensor: Tensor) -> None:
        """Check one tensor against the architecture and put it in its place; it may be overwritten afterwards.

        Raises:
            ModelWeightsInvalid: it has no place there, another shape, or is not finite.
            ModelUnsupported: it is of another dtype than weights are.
        """
        wanted = self._find(name, tensor.shape)
        module_path, _, attribute = name.rpartition(".")
        if attribute == "weight" and module_path in self._linears:
            transposed = isinstance(self._model.get_submodule(module_path), Conv1D)
            self._put_linear(module_path, self._quantized(name, tensor, transposed=transposed))
        elif self._is_quantized_stack(name):
            self._put_quantized_stack(name, tensor, len(tensor))
        else:
            _check_kind(name, tensor, wanted)
            value = tensor.to(self._device, self._dtype_of(name, wanted), copy=True)
            _refuse_not_finite(name, value, tensor)
            self._put_dense(name, value)

    def put_stack(self, name: str, matrices: Iterable[Tensor], shape: torch.Size) -> None:
        """Put a tensor in its place that comes in slices of its first dimension, each overwritten by the next.

        Args:
            name: the parameter's path.
            matrices: of one shape and dtype; none is asked for before the last is done with.
            shape: that they have together.

        Raises:
            ModelWeightsInvalid, ModelUnsupported: as `put`.
        """
        wanted = self._find(name, shape)
        if self._is_quantized_stack(name):
            self._put_quantized_stack(name, matrices, shape[0])
            return
        value = torch.empty(shape, dtype=self._dtype_of(name, wanted), device=self._device)
        for part, matrix in zip(value, matrices, strict=True):
            _check_kind(name, matrix, wanted)
            part.copy_(matrix)
            _refuse_not_finite(name, part, matrix)
        self._put_dense(name, value)

    def put_quantized(self, name: str, weight: NF4Weight) -> None:
        """Put a weight that the checkpoint has in NF4 in its place.

        Raises:
            ModelWeightsInvalid: it has another shape than the architecture's.
            ModelUnsupported: its place is no linear layer.
        """
        module_path, _, attribute = name.rpartition(".")
        owner = self._model.get_submodule(module_path)
        if attribute != "weight" or not is_plain_linear(owner):
            raise ModelUnsupported(
                f"{name} is in NF4 in the checkpoint, but {type(owner).__name__} is no linear layer "
                "that can be quantized"
            )
        # bitsandbytes keeps the transpose of a Conv1D, which is a linear layer's weight.
        transposed = isinstance(owner, Conv1D)
        self._find(name, weight.shape[::-1] if transposed else weight.shape)
        self._refuse_too_large(name, weight)
        if self._keep_nf4:
            self._put_linear(module_path, weight.to(self._device))
        else:
            dense = weight.dequantize()
            self.put(name, dense.T if transposed else dense)

    def _find(self, name: str, shape: torch.Size) -> Tensor:
        wanted = self._wanted.get(name)
        if wanted is None:
            raise ModelWeightsInvalid(f"the checkpoint makes {name}, which the model does not have")
        if shape != wanted.shape:
            raise ModelWeightsInvalid(
                f"{name} is {list(shape)} in the checkpoint, but config.json makes it "
                f"{list(wanted.shape)}"
            )
        return wanted

    def _quantized(self, name: str, tensor: Tensor, *, transposed: bool) -> NF4Weight:
        _refuse_other_than_floats(name, tensor)
        tensor = tensor.to(self._device)
        try:
            weight = self._quantize(tensor.T.contiguous() if transposed else tensor, name=name)
        except NonFiniteError as error:
            raise ModelWeightsInvalid(error.message) from error
        self._refuse_too_large(name, weight)
        return weight

    def _is_quantized_stack(self, name: str) -> bool:
        module_path, _, attribute = name.rpartition(".")
        return attribute in EXPERT_STACKS and module_path in self._experts

    def _put_quantized_stack(self, name: str, matrices: Iterable[Tensor], count: int) -> None:
        module_path, _, attribute = name.rpartition(".")
        experts: Any = self._model.get_submodule(module_path)
        weights = (
            self._quantized(f"{name}[{expert}]", one, transposed=experts.is_transposed)
            for expert, one in enumerate(matrices)
        )
        stack = NF4Stack(weights, count, compute_dtype=self._compute_dtype)
        delattr(experts, attribute)  # a parameter's name takes no module
        setattr(experts, attribute, stack)

    def _put_dense(self, name: str, value: Tensor) -> None:
        module_path, _, attribute = name.rpartition(".")
        owner = self._model.get_submodule(module_path)
        if attribute in owner._buffers:  # noqa: SLF001 - no public way to set a buffer in place
            owner._buffers[attribute] = value  # noqa: SLF001
        else:
            owner.register_parameter(attribute, nn.Parameter(value, requires_grad=False))

    def _refuse_too_large(self, name: str, weight: NF4Weight) -> None:
        """Refuse a weight that products in the compute dtype would make infinite."""
        lowest, highest = torch.aminmax(weight.scales())  # an offset may make them negative
        if not max(-lowest, highest) <= torch.finfo(self._compute_dtype).max:
            raise _too_large(name, self._compute_dtype)

    def _put_linear(self, module_path: str, weight: NF4Weight) -> None:
        bias: Any = self._model.get_submodule(module_path).bias  # on meta until its turn comes
        quantized = NF4Linear(weight, bias, compute_dtype=self._compute_dtype)
        self._model.set_submodule(module_path, quantized)

    def _dtype_of(self, name: str, wanted: Tensor) -> torch.dtype:
        if not wanted.is_floating_point():
            return wanted.dtype
        if any(re.search(pattern, name) for pattern in self._float32):
            return torch.float32
        return wanted.dtype


def _check_kind(name: str, tensor: Tensor, wanted: Tensor) -> None:
    if wanted.is_floating_point():
        _refuse_other_than_floats(name, tensor)
    elif tensor.is_floating_point():
        raise ModelUnsupported(
            f"{name} is {tensor.dtype} in the checkpoint, but the model counts in {wanted.dtype}"
        )


def _refuse_other_than_floats(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise ModelUnsupported(
            f"{name} is {tensor.dtype} in the checkpoint; only float16, bfloat16 and float32 "
            "weights can be loaded"
        )


def _refuse_not_finite(name: str, value: Tensor, source: Tensor) -> None:
    """Refuse a dense tensor with NaN or infinity, of its own or by the cast from ``source``."""
    if _is_finite(value):
        return
    if _is_finite(source):
        raise _too_large(name, value.dtype)
    raise ModelWeightsInvalid(f"{name} holds NaN or infinity in the checkpoint")


def _is_finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    # One pass without memory of its own, as fast as a copy; `isfinite` takes forty times as long.
    return all(math.isfinite(end.item()) for end in torch.aminmax(tensor))


def _too_large(name: str, dtype: torch.dtype) -> ModelWeightsInvalid:
    return ModelWeightsInvalid(
        f"{name} holds numbers that are too large for {dtype}; take another compute dtype"
    )


def use_nf4_experts(experts: Any) -> None:  # noqa: ANN401 - a family's own module
    """Make a module of experts compute by `experts_forward`, through transformers' own interface for that."""
    ALL_EXPERTS_FUNCTIONS.register(_EXPERTS_IMPLEMENTATION, experts_forward)
    experts.config._experts_implementation = _EXPERTS_IMPLEMENTATION  # noqa: SLF001


def _patterns_kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> list[str]:
    """Give the patterns of parameters that the architecture wants in float32 despite ``dtype``.

    Source: transformers 5.23, ``PreTrainedModel._get_dtype_plan``: patterns found anywhere in a name, ``*`` for anything.
    """
    always = model._keep_in_fp32_modules_strict or []  # noqa: SLF001 - transformers' own contract
    in_float16 = model._keep_in_fp32_modules or []  # noqa: SLF001
    if dtype == torch.float32:
        return []
    names = [*always, *(in_float16 if dtype == torch.float16 else [])]
    return [name.replace("*", ".*") for name in names]
