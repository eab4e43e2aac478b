"""Saves a model with NF4 layers as transformers and bitsandbytes read it.

The folder is written beside its place and renamed into it at the end, so it is whole or not there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_core.errors import ModelUnsupported
from qlora_core.models.checkpoint_folder import (
    copy_beside,
    find_source,
    refuse_target,
    whole_config,
    written_whole,
)
from qlora_core.models.naming import checkpoint_names
from qlora_core.models.skeleton import build_again
from qlora_core.models.writing import write_tensors
from qlora_core.nn.lora import LoraLinear
from qlora_core.nn.nf4_experts import NF4Stack
from qlora_core.nn.nf4_linear import NF4Linear

_SHARD_BYTES = 5 * 10**9


def save_quantized(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    shard_bytes: int = _SHARD_BYTES,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Save a model as a checkpoint that transformers loads with bitsandbytes, and `load_model` by itself.

    Args:
        model: as `load_model` gives it, without adapters.
        folder: where to; it must not be there yet, or be empty.
        source: the folder from which the tokenizer, chat templates and licence are copied; the one that the model was
            loaded from when None.
        shard_bytes: about the size of a weight file; a larger model is cut into several.
        overwrite: whether a folder with files in it is replaced.
        on_progress: called with (bytes done, bytes in all) of the weights.

    Returns:
        The files written.

    Raises:
        ConfigError: the folder has files in it, or would be its own source.
        ModelUnsupported: the model has adapters, or layers that transformers and bitsandbytes would not read.
        OSError: the disk is full, or refuses to be written to.
    """
    folder, source = Path(folder), find_source(model, source)
    refuse_target(folder, source, overwrite=overwrite)
    skeleton = build_again(model)
    _refuse_unreadable(model, skeleton)
    tensors = _gather(model, skeleton)
    config = _quantized_config(model, source)
    with written_whole(folder) as unfinished:
        files = write_tensors(unfinished, tensors, shard_bytes=shard_bytes, on_progress=on_progress)
        config.save_pretrained(unfinished)
        copy_beside(model, source, unfinished)
        files = [path.relative_to(unfinished) for path in unfinished.rglob("*") if path.is_file()]
    return sorted(folder / file for file in files)


def _refuse_unreadable(model: PreTrainedModel, skeleton: PreTrainedModel) -> None:
    skipped = [*_dense_layers(model), *(skeleton._keep_in_fp32_modules or ())]  # noqa: SLF001
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear):
            raise ModelUnsupported(
                f"{path} has an adapter; save the adapter by itself, or load the model anew"
            )
        if isinstance(module, NF4Stack):
            raise ModelUnsupported(
                f"{path} holds experts in NF4, for which bitsandbytes has no form; "
                "a model with quantized experts cannot be saved"
            )
        if not isinstance(module, NF4Linear):
            continue
        kind = type(skeleton.get_submodule(path))
        if kind not in (nn.Linear, Conv1D):
            raise ModelUnsupported(
                f"{path} is a {kind.__name__}, which transformers does not load in 4 bits; "
                "such a model cannot be saved"
            )
        if not should_convert_module(path, skipped):
            raise ModelUnsupported(
                f"{path} is in NF4, but by transformers' matching of names it counts to a layer that "
                "stays dense; quantize both, or skip both"
            )


def _dense_layers(model: PreTrainedModel) -> list[str]:
    """Give the paths of the layers that transformers would replace, but that are dense here."""
    return [
        path
        for path, module in model.named_modules()
        if type(module) is nn.Linear or isinstance(module, Conv1D)
    ]


def _gather(model: PreTrainedModel, skeleton: PreTrainedModel) -> dict[str, Tensor]:
    """Give all tensors to store, by their names in a checkpoint, in the model's order."""
    quantized = {
        f"{path}.weight": module
        for path, module in model.named_modules()
        if isinstance(module, NF4Linear)
    }
    held = dict(model.state_dict())
    ignored = set(model._keys_to_ignore_on_save or ())  # noqa: SLF001
    # Either of two tied names would do; transformers looks for the one that is not in its table.
    ignored |= {name for name in model.all_tied_weights_keys if name in held}
    names = [name for name in skeleton.state_dict() if name in quantized or name in held]
    names = [name for name in names if name not in ignored]
    tensors: dict[str, Tensor] = {}
    for name, stored in checkpoint_names(skeleton, names, quantized).items():
        if name in quantized:
            tensors |= quantized[name].nf4.to_bitsandbytes(stored)
        else:
            tensors[stored] = held[name]
    return tensors


def _quantized_config(model: PreTrainedModel, source: Path | None) -> Any:  # noqa: ANN401 - of any family
    config = whole_config(model, source)
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    dtype = str(model.dtype).removeprefix("torch.")
    config.dtype = dtype
    config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": any(layer.nested_absmax is not None for layer in layers),
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": _dense_layers(model),
    }
    return config
