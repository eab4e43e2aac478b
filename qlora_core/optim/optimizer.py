"""Builds an optimizer by its name."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from qlora_core.errors import ConfigError

OPTIMIZERS = ("adamw",)


def build_optimizer(
    name: str,
    params: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """Build an optimizer over trainable tensors.

    Args:
        name: one of ``OPTIMIZERS``; "adamw" keeps two float32 moments per element.
        params: the tensors to train, of one device.
        learning_rate: until the schedule sets another.
        weight_decay: decoupled, per step and unit of learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.

    Raises:
        ConfigError: no optimizer has this name.

    Source: AdamW, arXiv:1711.05101.
    """
    if name != "adamw":
        raise ConfigError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {name!r}")
    return torch.optim.AdamW(
        list(params),
        lr=learning_rate,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        fused=True,  # one pass over all tensors: without it small adapters spend a step's time here
    )
