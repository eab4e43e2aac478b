"""Loads a base model from safetensors, one tensor at a time, quantizing linear layers at once.

Memory holds the result and the tensor in hand, never the 16-bit model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from qlora_core.errors import (
    ModelUnsupported,
    ModelWeightsInvalid,
    ModelWeightsMissing,
    NonFiniteError,
)
from qlora_core.models.conversion import plan_loading
from qlora_core.models.files import WeightFiles, find_weights
from qlora_core.models.skeleton import build_skeleton
from qlora_core.nn.nf4_linear import NF4Linear
from qlora_core.quant import quantize_nf4
from qlora_core.quant.checks import FLOATS

# A subclass of nn.Linear whose own forward computes just what nn.Linear's does.
_PLAIN_LINEARS = frozenset({"Linear", "FalconLinear"})
_NAMES_SHOWN = 5


def load_model(
    path: str | Path,
    *,
    device: torch.device | str,
    compute_dtype: torch.dtype,
    skip_modules: Sequence[str] = ("lm_head",),
    quantize: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> PreTrainedModel:
    """Load a causal language model with its linear layers in NF4, doubly quantized.

    Args:
        path: folder with config.json and safetensors weights, in one file or in shards.
        device: where the model goes.
        compute_dtype: of everything that is not quantized, and of the products with what is.
            On a CPU use float32.
        skip_modules: short names or paths of linear layers that stay dense.
        quantize: False keeps every layer dense.
        on_progress: called with (bytes done, bytes in all) of the weight files.

    Returns:
        The model in evaluation mode, nothing in it trainable; its linear layers are `NF4Linear`s.

    Raises:
        ModelNotFound: the folder or its config.json is not there.
        ModelWeightsMissing: there are no weights, or tensors the architecture needs are absent.
        ModelWeightsPickle: the weights are only there as pickle files.
        ModelWeightsInvalid: a file is truncated, or a tensor has a wrong shape, is not finite, or
            has no place in the architecture.
        ModelUnsupported: transformers has no such causal language model, or its weights cannot be
            quantized.
    """
    folder, device = Path(path), torch.device(device)
    model = build_skeleton(folder, compute_dtype)
    files = find_weights(folder)
    fill = _Filling(model, device, compute_dtype, skip_modules, quantize=quantize)
    fill.refuse_what_cannot_be_quantized()
    steps, unexpected = plan_loading(model, files.file_of)
    _refuse_unexpected(model, unexpected)

    loaded: set[str] = set()
    with ExitStack() as stack:
        read = _reader(files, stack, on_progress)
        for step in steps:
            for name, tensor in step.run(model, read):
                fill.put(name, tensor)
                loaded.add(name)
    _finish(model, folder, device, loaded)
    if on_progress is not None:
        on_progress(files.total_bytes, files.total_bytes)
    return model


class _Filling:
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

    def refuse_what_cannot_be_quantized(self) -> None:
        """Refuse matrices that are no plain linear layers: they would silently stay 16-bit."""
        if not self._quantize:
            return
        for path, module in self._model.named_modules():
            name = type(module).__name__
            if isinstance(module, nn.Linear) and name not in _PLAIN_LINEARS:
                raise ModelUnsupported(f"{path} is a linear layer of its own kind, {name}")
            for parameter_name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() >= 3 and "Conv" not in name:
                    raise ModelUnsupported(
                        f"{path}.{parameter_name} of shape {list(parameter.shape)} holds the "
                        f"weights of several experts in one tensor ({name}); models with fused "
                        "experts cannot be quantized yet"
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


def _refuse_unexpected(model: PreTrainedModel, names: Sequence[str]) -> None:
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ())]  # noqa: SLF001
    # Buffers that older transformers saved and newer ones compute.
    ignored += [r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]
    left = [name for name in names if not any(re.search(pattern, name) for pattern in ignored)]
    if left:
        raise ModelWeightsInvalid(
            f"the checkpoint holds {len(left)} tensors that a {type(model).__name__} does not have "
            f"({_some(left)}); config.json and the weights do not belong together"
        )


def _reader(
    files: WeightFiles, stack: ExitStack, on_progress: Callable[[int, int], None] | None
) -> Callable[[str], Tensor]:
    """Give a function that reads one tensor; files stay open until ``stack`` closes."""
    opened: dict[Path, Any] = {}
    done = 0

    def read(name: str) -> Tensor:
        nonlocal done
        path = files.file_of[name]
        try:
            if path not in opened:
                opened[path] = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            tensor = opened[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelWeightsInvalid(
                f"the tensor {name} cannot be read from {path.name} ({error})"
            ) from error
        done += tensor.nbytes
        if on_progress is not None:
            on_progress(min(done, files.total_bytes), files.total_bytes)
        return tensor

    return read


def _finish(model: PreTrainedModel, folder: Path, device: torch.device, loaded: set[str]) -> None:
    """Tie what shares a weight, refuse what is still missing, and make the model ready to use."""
    missing = {name for name in model.state_dict() if _is_meta(model, name)} - loaded
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    left = sorted(name for name in missing if _is_meta(model, name))
    ignored = model._keys_to_ignore_on_load_missing or ()  # noqa: SLF001
    left = [name for name in left if not any(re.search(pattern, name) for pattern in ignored)]
    if left:
        raise ModelWeightsMissing(
            f"the checkpoint in {folder} lacks {len(left)} tensors that the model needs "
            f"({_some(left)})"
        )
    for module in model.modules():
        for name, buffer in module._buffers.items():  # noqa: SLF001
            if buffer is not None:
                module._buffers[name] = buffer.to(device)  # noqa: SLF001
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    model.requires_grad_(False)
    model.eval()


def _is_meta(model: PreTrainedModel, name: str) -> bool:
    return model.get_parameter_or_buffer(name).device.type == "meta"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown}, …"
