"""Loads an adapter over a base model, to answer with it or to train it on.

What the folder's tensors are is what the model gets: the config beside them says how they are scaled, and has to agree.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from qlora_core.errors import ConfigError
from qlora_core.export.adapter_folder import AdapterFolder, read_adapter
from qlora_core.export.fit import check_fits, refuse_differences
from qlora_core.nn import LoraConfig, adapter_modules, add_lora, lora_modules, saved_modules


def load_adapter(
    model: nn.Module, folder: Path | str, *, expected: LoraConfig | None = None
) -> LoraConfig:
    """Put a saved adapter over a model that has none; it can be trained on.

    Args:
        model: a base model, dense or quantized, without adapters.
        folder: as ``save_adapter`` or PEFT wrote it.
        expected: what whoever goes on training asks for. Its dropout is taken; everything else has to be what the
            adapter is. None: whatever the adapter is.

    Returns:
        The adapter's config.

    Raises:
        AdapterError: the folder is incomplete or malformed, uses something this engine cannot apply, was made for
            another model, or is not what was expected; the message says what differs.
        ConfigError: the model has adapters already, or ``expected`` does not fit the model.
    """
    if adapter_modules(model):
        raise ConfigError("the model has LoRA adapters already; load it again to start anew")
    adapter = read_adapter(Path(folder))
    saved = check_fits(model, adapter)
    config = adapter.config
    if expected is not None:
        refuse_differences(model, adapter, saved, expected)
        config = replace(config, dropout=expected.dropout)
    add_lora(model, _exactly(adapter, config, saved))
    _copy_in(model, adapter)
    return config


def _exactly(adapter: AdapterFolder, config: LoraConfig, saved: list[str]) -> LoraConfig:
    """Give a config that means the very modules of the tensors, whatever names mean in this model."""
    expressions = {path: re.escape(path) for path in adapter.pairs}
    return replace(
        config,
        target_modules="|".join(expressions.values()),
        exclude_modules=(),
        rank_pattern={name: config.rank_of(path) for path, name in expressions.items()},
        alpha_pattern={name: config.alpha_of(path) for path, name in expressions.items()},
        modules_to_save=tuple(saved),
    )


@torch.no_grad()
def _copy_in(model: nn.Module, adapter: AdapterFolder) -> None:
    for path, module in lora_modules(model).items():
        lora_a, lora_b = adapter.pairs[path]
        module.lora_A.copy_(lora_a)
        module.lora_B.copy_(lora_b)
    for path, module in saved_modules(model).items():
        for name, parameter in module.trained.items():
            parameter.copy_(adapter.whole[f"{path}.{name}"])
