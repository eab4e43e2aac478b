"""Saves a model with NF4 layers as transformers and bitsandbytes read it.

The folder is written beside its place and renamed into it at the end, so it is whole or not there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from qlora_core.errors import ModelUnsupported
from qlora_core.models.checkpoint_folder import (
    copy_beside,
    find_source,
    refuse_target,
    whole_config,
    written_whole,
)
from qlora_core.models.naming import checkpoint_names
from qlora_core.models.readable import dense_layers, refuse_layers
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
        ConfigError: the folder has files in it, or holds the model's own source.
        ModelUnsupported: the model has adapters, or layers that transformers and bitsandbytes would not read.
        OSError: the disk is full, or refuses to be written to.
    """
    folder, source = Path(folder), find_source(model, source)
    refuse_target(folder, source, overwrite=overwrite)
    skeleton = build_again(model)
    layers = _layers_in_nf4(model)
    experts = [path for path, module in model.named_modules() if isinstance(module, NF4Stack)]
    refuse_layers(skeleton, layers, experts)
    tensors = _gather(model, skeleton, layers)
    config = _quantized_config(model, layers, dense_layers(skeleton, layers), source)
    with written_whole(folder) as unfinished:
        write_tensors(unfinished, tensors, shard_bytes=shard_bytes, on_progress=on_progress)
        config.save_pretrained(unfinished)
        copy_beside(model, source, unfinished)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _layers_in_nf4(model: PreTrainedModel) -> dict[str, NF4Linear]:
    """Give the NF4 layers by path; refuse a model that has adapters over them."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear):
            raise ModelUnsupported(
                f"{path} has an adapter; save the adapter by itself, or load the model anew"
            )
    return {path: module for path, module in model.named_modules() if isinstance(module, NF4Linear)}


def _gather(
    model: PreTrainedModel, skeleton: PreTrainedModel, layers: Mapping[str, NF4Linear]
) -> dict[str, Tensor]:
    """Give all tensors to store, by their names in a checkpoint, in the model's order."""
    quantized = {f"{path}.weight": layer for path, layer in layers.items()}
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


def _quantized_config(
    model: PreTrainedModel, layers: Mapping[str, NF4Linear], dense: list[str], source: Path | None
) -> Any:  # noqa: ANN401 - of any family
    config = whole_config(model, source)
    dtype = str(model.dtype).removeprefix("torch.")
    config.dtype = dtype
    config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": any(one.nf4.double_quant for one in layers.values()),
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense,
    }
    return config
