"""Builds an optimizer by its name.

"adamw" is torch's own fused one: with moments in 32 bits it is as exact, and well tried on every device.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from qlora_core.errors import ConfigError
from qlora_core.optim.flat_adamw import FlatAdamW

OPTIMIZERS = ("adamw", "adamw_8bit")


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
        name: one of ``OPTIMIZERS``; "adamw" keeps two float32 moments per element, "adamw_8bit"
            two of 8 bits, and its parameters become views of one buffer.
        params: the tensors to train, of one device.
        learning_rate: until the schedule sets another.
        weight_decay: decoupled, per step and unit of learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.

    Raises:
        ConfigError: no optimizer has this name.

    Source: AdamW, arXiv:1711.05101.
    """
    if name == "adamw_8bit":
        return FlatAdamW(
            list(params),
            bits=8,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            betas=betas,
            eps=eps,
        )
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
