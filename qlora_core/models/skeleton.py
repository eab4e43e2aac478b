"""Builds a transformers model without its weights: parameters on the meta device, buffers real.

Buffers such as a rotary embedding's frequencies are computed by the model's own constructor and are
in no checkpoint, so they must not be built on the meta device.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qlora_core.errors import ModelUnsupported
from qlora_core.models.files import read_config
from qlora_core.quoting import quoted

# transformers' own mark of what its initialization is not to touch.
_LEAVE_ALONE = "_is_hf_initialized"

# transformers' constructors set torch's default dtype and its functions of initialization for the whole process, and put
# back what they found: of two at once, the other's.
_one_at_a_time = threading.Lock()
_here = threading.local()


def build_skeleton(folder: Path, compute_dtype: torch.dtype) -> PreTrainedModel:
    """Build the causal language model that ``folder``'s config.json describes, without weights.

    Args:
        folder: holds config.json; its weights are not touched.
        compute_dtype: of the parameters that will not be quantized.

    Returns:
        The model with every parameter on the meta device and every buffer on the CPU.

    Raises:
        ModelNotFound: the folder or its config.json is not there.
        ModelUnsupported: the installed transformers has no causal language model for it,
            or it needs code from the folder.
    """
    model_type = quoted(read_config(folder).get("model_type", "unknown"))
    config = _read_architecture(folder, model_type)
    # How the weights are stored is the loader's affair; the architecture is the same.
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    try:
        with _one_at_a_time:
            with _parameters_on_meta():
                model = AutoModelForCausalLM.from_config(
                    config, dtype=compute_dtype, trust_remote_code=False
                )
            _compute_buffers_again(model)
    # transformers' constructors raise whatever wrong sizes lead them to.
    except Exception as error:
        raise ModelUnsupported(
            f"transformers cannot build a causal language model of type {model_type} "
            f"from {folder / 'config.json'}: {first_line(error)}"
        ) from error
    model.config._name_or_path = str(folder)  # noqa: SLF001 - where from_pretrained keeps it
    return model


def build_again(model: PreTrainedModel) -> PreTrainedModel:
    """Build a model's architecture anew, everything on the meta device: with transformers' own layers."""
    with _one_at_a_time, torch.device("meta"), torch.random.fork_rng(devices=[]):
        return type(model)(deepcopy(model.config))


def _read_architecture(folder: Path, model_type: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # transformers raises whatever its config classes do on wrong fields.
    except Exception as error:
        raise ModelUnsupported(
            f"transformers cannot read {folder / 'config.json'} (model type {model_type}): "
            f"{first_line(error)}"
        ) from error


def first_line(error: Exception) -> str:
    """Give the first line of what transformers said; the rest lists what it supports."""
    return quoted(str(error).strip().partition("\n")[0] or type(error).__name__)


def _compute_buffers_again(model: PreTrainedModel) -> None:
    """Fill the buffers that no checkpoint holds as ``from_pretrained`` does: not in the compute dtype's precision."""
    for parameter in model.parameters():
        setattr(parameter, _LEAVE_ALONE, True)
    for module in model.modules():
        setattr(module, _LEAVE_ALONE, False)
    with torch.random.fork_rng(devices=[]):
        model.initialize_weights()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Send every parameter that this thread registers inside the block to the meta device, one at a time."""
    # Initialising parameters on meta is void, but may still draw from the global generator.
    with torch.random.fork_rng(devices=[]):
        _here.on_meta = True
        try:
            yield
        finally:
            _here.on_meta = False


def _send_to_meta(_module: nn.Module, _name: str, param: nn.Parameter) -> nn.Parameter | None:
    # A parameter that is on meta already may be a tied one: keep it the same object.
    if not getattr(_here, "on_meta", False) or param.device.type == "meta":
        return None
    return nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)


# Once and for all: torch goes through its hooks without a lock, so none may come or go while a thread builds a module.
register_module_parameter_registration_hook(_send_to_meta)  # pyright: ignore[reportArgumentType]
