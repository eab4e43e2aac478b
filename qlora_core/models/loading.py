"""Loads a base model from safetensors, one tensor at a time, quantizing linear layers at once.

Memory holds the result and the tensor in hand, never the 16-bit model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from transformers import GenerationConfig, PreTrainedModel

from qlora_core.errors import ModelUnsupported, ModelWeightsInvalid, ModelWeightsMissing
from qlora_core.models.choice import choose_layers
from qlora_core.models.conversion import PlanStep, plan_loading
from qlora_core.models.files import find_weights, read_config
from qlora_core.models.filling import Filling
from qlora_core.models.placement import check_compute_dtype, find_device
from qlora_core.models.prequantized import group_tensors, refuse_other_formats
from qlora_core.models.reading import TensorReader
from qlora_core.models.saving import refuse_save_pretrained
from qlora_core.models.single_experts import find_single_experts
from qlora_core.models.skeleton import build_skeleton, first_line
from qlora_core.quant import NF4Weight, quantize_nf4
from qlora_core.quoting import quoted

_NAMES_SHOWN = 5


def load_model(
    path: str | Path,
    *,
    device: torch.device | str,
    compute_dtype: torch.dtype,
    skip_modules: Sequence[str] = ("lm_head",),
    quantize: bool = True,
    block_size: int = 64,
    double_quant: bool = True,
    scale: Literal["absmax", "mse"] = "absmax",
    on_progress: Callable[[int, int], None] | None = None,
) -> PreTrainedModel:
    """Load a causal language model with its linear layers in NF4.

    A checkpoint that bitsandbytes has quantized to NF4 already is loaded as it is: its 4-bit layers with the same bits,
    the others dense, whatever ``skip_modules``, ``block_size``, ``double_quant`` and ``scale`` say.

    Args:
        path: folder with config.json and safetensors weights, in one file or in shards.
        device: where the model goes.
        compute_dtype: of everything that is not quantized, and of the products with what is.
            On a CPU use float32.
        skip_modules: short names or paths of linear layers that stay dense; ``lm_head`` stands for the output head,
            whatever the architecture calls it.
        quantize: False keeps every layer dense, and makes those dense that the checkpoint has in NF4.
        block_size: elements per scale, a power of two from 32 to 4096.
        double_quant: whether the scales become 8-bit codes too.
        scale: how a block's scale is found, as in `quantize_nf4`.
        on_progress: called with (bytes done, bytes in all) of the weight files.

    Returns:
        The model in evaluation mode, nothing in it trainable; its linear layers are `NF4Linear`s. Embeddings,
        convolutions, routers, norms and what shares its weight with another layer stay dense.

    Raises:
        ModelNotFound: the folder or its config.json is not there.
        ModelWeightsMissing: there are no weights, or tensors the architecture needs are absent.
        ModelWeightsPickle: the weights are only there as pickle files.
        ModelWeightsInvalid: a file is truncated, or a tensor has a wrong shape, is not finite, is too large for
            ``compute_dtype``, or has no place in the architecture.
        ModelUnsupported: transformers has no such causal language model, its weights cannot be
            quantized, or are quantized already in another way.
        ConfigError: another argument is not as described, or the device is not there.
    """
    found = find_device(device)
    check_compute_dtype(compute_dtype)
    quantizer = partial(quantize_nf4, block_size=block_size, double_quant=double_quant, scale=scale)
    # The model is the same wherever this is called: trainable, and where it was asked for.
    with torch.inference_mode(False), torch.device("cpu"):
        return _load(
            Path(path),
            found,
            compute_dtype,
            skip_modules,
            quantizer,
            on_progress,
            quantize=quantize,
        )


def _load(
    folder: Path,
    device: torch.device,
    compute_dtype: torch.dtype,
    skip_modules: Sequence[str],
    quantizer: Callable[..., NF4Weight],
    on_progress: Callable[[int, int], None] | None,
    *,
    quantize: bool,
) -> PreTrainedModel:
    declared = refuse_other_formats(folder, read_config(folder))
    model = build_skeleton(folder, compute_dtype)
    files = find_weights(folder)
    in_nf4 = group_tensors(files.places)
    if declared and not in_nf4:
        raise ModelWeightsInvalid(
            f"config.json of {folder} says that its weights are quantized, but none of them is"
        )
    choice = choose_layers(model, skip_modules) if quantize and not in_nf4 else None
    fill = Filling(model, device, compute_dtype, choice, quantizer, keep_nf4=quantize)
    beside = {key for keys in in_nf4.values() for key in keys[1:]}
    steps, unexpected = plan_loading(model, files.places.keys() - beside)
    _refuse_unexpected(model, unexpected)

    loaded: set[str] = set()
    with TensorReader(files, device, on_progress) as reader:
        for step in steps:
            if any(name in in_nf4 for name, _ in step.sources):
                fill.put_quantized(step.target, _take_quantized(step, in_nf4, reader))
                loaded.add(step.target)
                continue
            experts = find_single_experts(step, files.places)
            if experts is not None:
                matrices = map(reader.lend_joined, experts.names)
                fill.put_stack(step.target, matrices, experts.shape)
                loaded.add(step.target)
                continue
            for name, tensor in step.run(model, reader):
                fill.put(name, tensor)
                loaded.add(name)
    _finish(model, folder, device, fill.wanted - loaded)
    if quantize:
        refuse_save_pretrained(model)
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


def _take_quantized(
    step: PlanStep, in_nf4: dict[str, list[str]], reader: TensorReader
) -> NF4Weight:
    """Read a weight that is in NF4 already.

    Raises:
        ModelUnsupported: transformers would make another parameter of it, which needs it dense.
    """
    name = step.sources[0][0]
    if step.converter is not None or len(step.sources) > 1:
        raise ModelUnsupported(
            f"{name} is in NF4 in the checkpoint, but this architecture makes {step.target} of it and of others, "
            "which needs them dense; start from the 16- or 32-bit weights"
        )
    return NF4Weight.from_bitsandbytes({key: reader.take(key) for key in in_nf4[name]}, name)


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
    shown = ", ".join(quoted(name) for name in names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown}, …"
