"""Puts checkpoint tensors into a skeleton, each in its final form: quantized, or cast and moved."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_core.errors import ModelUnsupported, ModelWeightsInvalid, NonFiniteError
from qlora_core.nn.nf4_linear import NF4Linear
from qlora_core.quant import quantize_nf4
from qlora_core.quant.checks import FLOATS

# A subclass of nn.Linear whose own forward computes just what nn.Linear's does.
_PLAIN_LINEARS = frozenset({"Linear", "FalconLinear"})


class Filling:
    """Puts tensors into a skeleton, each in its final form."""

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        compute_dtype: torch.dtype,
        skip_modules: Sequence[str],
        *,
        quantize: bool,
    ) -> None:
        self._model = model
        self._device = device
        self._compute_dtype = compute_dtype
        self._wanted = dict(model.state_dict())
        self._float32 = _patterns_kept_in_float32(model, compute_dtype)
        self._quantized = _linears_to_quantize(model, skip_modules) if quantize else frozenset()
        self._quantize = quantize

    @property
    def wanted(self) -> set[str]:
        """The names of all parameters and saved buffers of the architecture."""
        return set(self._wanted)

    def refuse_what_cannot_be_quantized(self) -> None:
        """Refuse matrices that are no plain linear layers: they would silently stay 16-bit."""
        if not self._quantize:
            return
        for path, module in self._model.named_modules():
            kind = type(module).__name__
            own_kind = isinstance(module, nn.Linear) and kind not in _PLAIN_LINEARS
            if own_kind or isinstance(module, Conv1D):
                raise ModelUnsupported(
                    f"{path} is a linear layer of its own kind ({kind}), which cannot be quantized"
                )
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() >= 3 and "Conv" not in kind:
                    raise ModelUnsupported(
                        f"{path}.{name} of shape {list(parameter.shape)} holds the weights of "
                        f"several experts in one tensor ({kind}); models with fused experts cannot "
                        "be quantized yet"
                    )
        if not self._quantized:
            raise ModelUnsupported(
                f"{type(self._model).__name__} has no linear layers that could be quantized"
            )

    def put(self, name: str, tensor: Tensor) -> None:
        """Check one tensor against the architecture and put it in its place."""
        wanted = self._wanted.get(name)
        if wanted is None:
            raise ModelWeightsInvalid(f"the checkpoint makes {name}, which the model does not have")
        if tensor.shape != wanted.shape:
            raise ModelWeightsInvalid(
                f"{name} is {list(tensor.shape)} in the checkpoint, but config.json makes it "
                f"{list(wanted.shape)}"
            )
        if wanted.is_floating_point() and tensor.dtype not in FLOATS:
            raise ModelUnsupported(
                f"{name} is {tensor.dtype} in the checkpoint; only float16, bfloat16 and float32 "
                "weights can be loaded"
            )
        module_path, _, attribute = name.rpartition(".")
        if attribute == "weight" and module_path in self._quantized:
            self._put_quantized(module_path, name, tensor)
            return
        owner = self._model.get_submodule(module_path)
        value = tensor.to(self._device, self._dtype_of(name, wanted), copy=True)
        if attribute in owner._buffers:  # noqa: SLF001 - no public way to set a buffer in place
            owner._buffers[attribute] = value  # noqa: SLF001
        else:
            owner.register_parameter(attribute, nn.Parameter(value, requires_grad=False))

    def _put_quantized(self, module_path: str, name: str, tensor: Tensor) -> None:
        linear = self._model.get_submodule(module_path)
        try:
            weight = quantize_nf4(tensor.to(self._device), name=name)
        except NonFiniteError as error:
            raise ModelWeightsInvalid(error.message) from error
        bias: Any = linear.bias  # on meta until the checkpoint's turn comes
        quantized = NF4Linear(weight, bias, compute_dtype=self._compute_dtype)
        self._model.set_submodule(module_path, quantized)

    def _dtype_of(self, name: str, wanted: Tensor) -> torch.dtype:
        if not wanted.is_floating_point():
            return wanted.dtype
        if any(re.search(pattern, name) for pattern in self._float32):
            return torch.float32
        return wanted.dtype


def _linears_to_quantize(model: PreTrainedModel, skip_modules: Sequence[str]) -> frozenset[str]:
    """Give the paths of the linear layers to quantize; a weight tied to another stays dense."""
    tied = model.all_tied_weights_keys
    shared = {name.rpartition(".")[0] for pair in tied.items() for name in pair}
    return frozenset(
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path not in shared and not _names(path, skip_modules)
    )


def _names(path: str, skip_modules: Sequence[str]) -> bool:
    """Whether one of the names is the path, the end of it, or a part it lies under."""
    dotted = f".{path}."
    return any(f".{name}." in dotted for name in skip_modules)


def _patterns_kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> list[str]:
    """Give the patterns of parameters that the architecture wants in float32 despite ``dtype``."""
    always = model._keep_in_fp32_modules_strict or []  # noqa: SLF001 - transformers' own contract
    in_float16 = model._keep_in_fp32_modules or []  # noqa: SLF001
    if dtype == torch.float32:
        return []
    names = [*always, *(in_float16 if dtype == torch.float16 else [])]
    return [rf"(^|\.){re.escape(name)}(\.|$)" for name in names]
