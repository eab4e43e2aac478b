"""Puts LoRA over a model's linear layers, chosen by name, and freezes everything else."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import nn

from qlora_core.errors import AdapterError, ConfigError
from qlora_core.nn.config import ALL_LINEAR, LoraConfig
from qlora_core.nn.lora import LoraLinear, linear_shape
from qlora_core.nn.mixers import call_layers_in_training
from qlora_core.nn.nf4_linear import NF4Linear
from qlora_core.nn.saved_modules import SavedModule, find_saved, save_modules, saved_modules
from qlora_core.nn.targets import find_targets, left_out

_log = logging.getLogger(__name__)


def add_lora(model: nn.Module, config: LoraConfig, *, seed: int = 0) -> list[str]:
    """Put an adapter over every targeted linear layer and freeze all other parameters.

    A starts as kaiming_uniform(a=sqrt(5)), from a generator of its own seeded by ``seed`` and the
    module's path (the global one is neither read nor moved); B starts as zeros, and what
    ``modules_to_save`` names as a copy of itself, so the model's answers do not change.

    What "all-linear" leaves out (`left_out`) is written to the log as a warning.

    Args:
        model: a transformers causal language model, dense or with `NF4Linear`s. It stays one: it can be called with
            labels, generate, be copied, moved and cast; ``save_pretrained`` alone is refused with a sentence.
        config: rank, scale, dropout and targets.
        seed: of A.

    Returns:
        The paths of the modules that got an adapter, in the model's order.

    Raises:
        ConfigError: the model has adapters already.
        LoraTargetError: a name of the config fits nothing in the model; `find_targets` and `find_saved` say when.
    """
    if adapter_modules(model):
        raise ConfigError("the model has LoRA adapters already; load it again to start anew")
    saved = find_saved(model, config.modules_to_save)
    targets = find_targets(model, config, saved=saved)
    if config.target_modules == ALL_LINEAR and (others := left_out(model)):
        _log.warning("all-linear leaves out %s", "; ".join(others))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path in targets:
        base = model.get_submodule(path)
        adapter = _new_adapter(base, config, path, seed=_seed_of(seed, path))
        adapter.train(base.training)
        model.set_submodule(path, adapter)
    save_modules(model, saved)
    call_layers_in_training(model)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = MethodType(_refuse_save_pretrained, model)
    return targets


def lora_modules(model: nn.Module) -> dict[str, LoraLinear]:
    """Give the model's adapters by the path of the layer they sit on, in the model's order."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)
    }


def adapter_modules(model: nn.Module) -> dict[str, LoraLinear | SavedModule]:
    """Give everything that was put in to be trained: LoRA adapters and modules trained whole, by path."""
    return {**lora_modules(model), **saved_modules(model)}


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Let the base model alone answer inside the block; adapters come back as they were after it."""
    before = [(module, module.enabled) for module in adapter_modules(model).values()]
    for module, _ in before:
        module.enabled = False
    try:
        yield
    finally:
        for module, enabled in before:
            module.enabled = enabled


def _refuse_save_pretrained(model: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ANN401, ARG001
    raise AdapterError(
        "save_pretrained would write adapters into a checkpoint that nothing can load: use qlora_core.save_adapter for "
        "the adapter alone, or qlora_core.merge for a whole model"
    )


def _seed_of(seed: int, path: str) -> int:
    """Mix seed and path, so that a layer's start does not depend on which others are adapted."""
    digest = hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _new_adapter(base: nn.Module, config: LoraConfig, path: str, *, seed: int) -> LoraLinear:
    out_features, in_features = linear_shape(base)
    device = (
        base.packed.device if isinstance(base, NF4Linear) else base.get_parameter("weight").device
    )
    r = config.rank_of(path)
    # Drawn on the CPU: the same start on every device.
    generator = torch.Generator(device="cpu").manual_seed(seed)
    lora_a = torch.empty(r, in_features, dtype=torch.float32, device="cpu")
    nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5), generator=generator)
    lora_b = torch.zeros(out_features, r, dtype=torch.float32, device=device)
    return LoraLinear(
        base,
        lora_a.to(device),
        lora_b,
        alpha=config.alpha_of(path),
        dropout=config.dropout,
        use_rslora=config.use_rslora,
    )
