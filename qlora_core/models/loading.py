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
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from qlora_core.errors import ModelUnsupported, ModelWeightsInvalid, ModelWeightsMissing
from qlora_core.models.conversion import plan_loading
from qlora_core.models.files import WeightFiles, find_weights
from qlora_core.models.filling import Filling
from qlora_core.models.skeleton import build_skeleton, first_line

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
    fill = Filling(model, device, compute_dtype, skip_modules, quantize=quantize)
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
    _finish(model, folder, device, fill.wanted - loaded)
    if on_progress is not None:
        on_progress(files.total_bytes, files.total_bytes)
    return model


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


def _finish(
    model: PreTrainedModel, folder: Path, device: torch.device, not_loaded: set[str]
) -> None:
    """Tie what shares a weight, refuse what is still missing, and make the model ready to use."""
    # Takes the names of what it ties out of the set.
    model.tie_weights(missing_keys=not_loaded, recompute_mapping=False)
    ignored = model._keys_to_ignore_on_load_missing or ()  # noqa: SLF001
    left = [name for name in not_loaded if not any(re.search(pattern, name) for pattern in ignored)]
    if left:
        raise ModelWeightsMissing(
            f"the checkpoint in {folder} lacks {len(left)} tensors that the model needs "
            f"({_some(sorted(left))})"
        )
    for module in model.modules():
        for name, buffer in module._buffers.items():  # noqa: SLF001
            if buffer is not None:
                module._buffers[name] = buffer.to(device)  # noqa: SLF001
    if (folder / "generation_config.json").is_file():
        model.generation_config = _read_generation_config(folder)
    model.requires_grad_(False)
    model.eval()


def _read_generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    # transformers raises whatever its own checks do.
    except Exception as error:
        raise ModelUnsupported(
            f"transformers cannot read {folder / 'generation_config.json'}: {first_line(error)}"
        ) from error


def _some(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown}, …"
