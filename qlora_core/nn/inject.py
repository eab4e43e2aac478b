"""Puts LoRA over a model's linear layers, chosen by name, and freezes everything else."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qlora_core.errors import ConfigError, LoraTargetError
from qlora_core.nn.config import LoraConfig
from qlora_core.nn.lora import LoraLinear
from qlora_core.nn.nf4_linear import NF4Linear


def add_lora(model: nn.Module, config: LoraConfig, *, seed: int = 0) -> list[str]:
    """Put an adapter over every targeted linear layer and freeze all other parameters.

    A starts as kaiming_uniform(a=sqrt(5)), from a generator of its own seeded by ``seed`` and the
    module's path (the global one is neither read nor moved); B starts as zeros, so the model's
    answers do not change.

    Args:
        model: a transformers causal language model, dense or with `NF4Linear`s.
        config: rank, scale, dropout and targets.
        seed: of A.

    Returns:
        The paths of the modules that got an adapter, in the model's order.

    Raises:
        ConfigError: the model has adapters already.
        LoraTargetError: a target names no linear layer, or names the output head.
    """
    if lora_modules(model):
        raise ConfigError("the model has LoRA adapters already; load it again to start anew")
    targets = find_targets(model, config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path in targets:
        base = model.get_submodule(path)
        adapter = _new_adapter(base, config, seed=_seed_of(seed, path))  # pyright: ignore[reportArgumentType]
        adapter.train(base.training)
        model.set_submodule(path, adapter)
    return targets


def find_targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """Give the paths of the linear layers that ``config`` names, in the model's order.

    Raises:
        LoraTargetError: a target names no linear layer, or names the output head.
    """
    head = _output_head(model)
    linears = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | NF4Linear) and module is not head
    ]
    if config.target_modules == "all-linear":
        if not linears:
            raise LoraTargetError("the model has no linear layers to adapt besides its output head")
        return linears
    found = {target: _matching(linears, target) for target in config.target_modules}
    missing = [target for target, paths in found.items() if not paths]
    if missing:
        known = sorted({path.rpartition(".")[2] for path in linears})
        raise LoraTargetError(
            f"no linear layer of the model can take LoRA under the name {', '.join(missing)}; "
            f"it has {', '.join(known)}"
        )
    chosen = {path for paths in found.values() for path in paths}
    return [path for path in linears if path in chosen]


def lora_modules(model: nn.Module) -> dict[str, LoraLinear]:
    """Give the model's adapters by the path of the layer they sit on, in the model's order."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)
    }


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Let the base model alone answer inside the block; adapters come back as they were after it."""
    before = [(module, module.enabled) for module in lora_modules(model).values()]
    for module, _ in before:
        module.enabled = False
    try:
        yield
    finally:
        for module, enabled in before:
            module.enabled = enabled


def _output_head(model: nn.Module) -> nn.Module | None:
    get_head = getattr(model, "get_output_embeddings", None)
    return None if get_head is None else get_head()


def _matching(paths: list[str], target: str) -> list[str]:
    return [path for path in paths if path == target or path.endswith(f".{target}")]


def _seed_of(seed: int, path: str) -> int:
    """Mix seed and path, so that a layer's start does not depend on which others are adapted."""
    digest = hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _new_adapter(base: NF4Linear | nn.Linear, config: LoraConfig, *, seed: int) -> LoraLinear:
    device = base.packed.device if isinstance(base, NF4Linear) else base.weight.device
    # Drawn on the CPU: the same start on every device.
    generator = torch.Generator(device="cpu").manual_seed(seed)
    lora_a = torch.empty(config.r, base.in_features, dtype=torch.float32, device="cpu")
    nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5), generator=generator)
    lora_b: Tensor = torch.zeros(base.out_features, config.r, dtype=torch.float32, device=device)
    return LoraLinear(
        base, lora_a.to(device), lora_b, scaling=config.scaling, dropout=config.dropout
    )
