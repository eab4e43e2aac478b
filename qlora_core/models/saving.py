"""Saves a model with NF4 layers as transformers and bitsandbytes read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MethodType
from typing import Any, NoReturn

from torch import Tensor
from transformers import PreTrainedModel

from qlora_core.errors import ConfigError, ModelUnsupported
from qlora_core.models.checkpoint_folder import (
    copy_beside,
    find_source,
    refuse_target,
    whole_config,
)
from qlora_core.models.naming import checkpoint_names
from qlora_core.models.readable import dense_layers, refuse_layers
from qlora_core.models.skeleton import build_again
from qlora_core.models.writing import write_tensors
from qlora_core.nn.lora import LoraLinear
from qlora_core.nn.nf4_experts import NF4Stack
from qlora_core.nn.nf4_linear import NF4Linear
from qlora_core.quant.checks import FLOATS
from qlora_core.quoting import quoted
from qlora_core.whole_folder import written_whole

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
        ConfigError: `refuse_target` says when of the folder; or no layer of the model is in NF4.
        ModelUnsupported: the model has adapters, layers that transformers and bitsandbytes would not read, or layers
            that something else than `load_model` has quantized.
        OSError: the disk is full, or refuses to be written to.
    """
    folder, source = Path(folder), find_source(model, source)
    refuse_target(folder, source, overwrite=overwrite)
    skeleton = build_again(model)
    layers = _layers_in_nf4(model)
    experts = [path for path, module in model.named_modules() if isinstance(module, NF4Stack)]
    refuse_layers(skeleton, layers, experts)
    _refuse_quantized_by_others(model)
    if not layers:
        raise ConfigError(
            "no layer of the model is in NF4 (each was skipped, or it was loaded with quantize=False), so that there is "
            "nothing quantized to save; model.save_pretrained saves a dense model"
        )
    tensors = _gather(model, skeleton, layers)
    config = _quantized_config(model, layers, dense_layers(skeleton, layers), source)
    with written_whole(folder) as unfinished:
        write_tensors(unfinished, tensors, shard_bytes=shard_bytes, on_progress=on_progress)
        config.save_pretrained(unfinished)
        copy_beside(model, source, unfinished)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def refuse_save_pretrained(model: PreTrainedModel) -> None:
    """Make a model's own ``save_pretrained`` raise ConfigError: transformers would write NF4 layers in a way of nobody's."""
    model.save_pretrained = MethodType(_refuse_save_pretrained, model)


def _refuse_save_pretrained(model: PreTrainedModel, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ANN401, ARG001
    raise ConfigError(
        "save_pretrained would write NF4 layers into a checkpoint that nothing can load: use qlora_core.save_quantized, "
        "or qlora_core.merge for a dense model with its adapters"
    )


def _layers_in_nf4(model: PreTrainedModel) -> dict[str, NF4Linear]:
    """Give the NF4 layers by path; refuse a model that has adapters over them."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear):
            raise ModelUnsupported(
                f"{path} has an adapter; save the adapter by itself, or load the model anew"
            )
    return {path: module for path, module in model.named_modules() if isinstance(module, NF4Linear)}


def _refuse_quantized_by_others(model: PreTrainedModel) -> None:
    settings = getattr(model.config, "quantization_config", None)
    if settings is not None:
        method = getattr(settings, "quant_method", None)
        raise ModelUnsupported(
            f"the model was quantized by transformers ({quoted(getattr(method, 'value', method))}), not by load_model; "
            "save it with its own save_pretrained, or load the 16-bit weights with load_model"
        )


def _gather(
    model: PreTrainedModel, skeleton: PreTrainedModel, layers: Mapping[str, NF4Linear]
) -> dict[str, Tensor]:
    """Give all tensors to store, by their names in a checkpoint, in the model's order.

    Raises:
        ModelUnsupported: a tensor is not what the architecture has in its place.
    """
    quantized = {f"{path}.weight": layer for path, layer in layers.items()}
    held = dict(model.state_dict())
    ignored = set(model._keys_to_ignore_on_save or ())  # noqa: SLF001
    # Either of two tied names would do; transformers looks for the one that is not in its table.
    ignored |= {name for name in model.all_tied_weights_keys if name in held}
    wanted = {name: one for name, one in skeleton.state_dict().items() if name not in ignored}
    for name in wanted.keys() - quantized.keys():
        _refuse_foreign(name, held.get(name), wanted[name])
    tensors: dict[str, Tensor] = {}
    for name, stored in checkpoint_names(skeleton, wanted, quantized).items():
        if name in quantized:
            tensors |= quantized[name].nf4.to_bitsandbytes(stored)
        else:
            tensors[stored] = held[name]
    return tensors


def _refuse_foreign(name: str, tensor: Tensor | None, wanted: Tensor) -> None:
    """Refuse what only looks like a dense weight, such as the codes of another quantization."""
    dtypes = FLOATS if wanted.is_floating_point() else (wanted.dtype,)
    if (
        tensor is not None
        and not tensor.is_meta
        and tensor.shape == wanted.shape
        and tensor.dtype in dtypes
    ):
        return
    found = (
        "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
    )
    raise ModelUnsupported(
        f"{name} is {found}, where a dense model has {list(wanted.shape)}; it was changed by something else than "
        "load_model, so that it cannot be saved"
    )


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
