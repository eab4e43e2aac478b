"""Builds an optimizer by its name: all of them AdamW over one buffer, with moments of some width.

A paged one keeps its moments on the host and has them on the GPU for the step only; on a CPU it is the
same as the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from qlora_core.errors import ConfigError
from qlora_core.optim.flat_adamw import FlatAdamW
from qlora_core.optim.paged_memory import open_paged_memory
from qlora_core.optim.state_memory import PlainMemory

OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")


def build_optimizer(
    name: str,
    params: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    max_grad_norm: float = math.inf,
    copy_dtype: torch.dtype | None = None,
) -> FlatAdamW:
    """Build an optimizer over trainable tensors, which become views of one buffer.

    Args:
        name: one of ``OPTIMIZERS``; "adamw" keeps two float32 moments per element, "adamw_8bit"
            two of 8 bits, and those whose names begin with "paged" keep them on the host.
        params: the tensors to train, float32, of one device.
        learning_rate: until the schedule sets another.
        weight_decay: decoupled, per step and unit of learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        max_grad_norm: longer gradients are scaled down to it.
        copy_dtype: of a copy of the parameters in 16 bits, None for none.

    Raises:
        ConfigError: no optimizer has this name.

    Source: AdamW, arXiv:1711.05101.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {name!r}")
    return FlatAdamW(
        list(params),
        bits=8 if name.endswith("8bit") else 32,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        betas=betas,
        eps=eps,
        max_grad_norm=max_grad_norm,
        copy_dtype=copy_dtype,
        open_memory=open_paged_memory if name.startswith("paged") else PlainMemory,
    )
