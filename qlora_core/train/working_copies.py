"""Brings the optimizer's copies in 16 bits to the layers that multiply with them."""

from __future__ import annotations

import torch

from qlora_core.nn import LoraLinear
from qlora_core.optim.flat_adamw import FlatAdamW


def copy_dtype_of(layers: list[LoraLinear], *, n_trained: int) -> torch.dtype | None:
    """Give the dtype in which copies of trained tensors are worth their memory, None where they are not.

    A module that is trained whole would get a copy of its whole matrix, which it has no use for.

    Args:
        layers: the adapters, where they will be trained.
        n_trained: how many tensors are trained in all.
    """
    dtypes = {layer.product_dtype(layer.lora_A.device) for layer in layers}
    if len(dtypes) != 1 or torch.float32 in dtypes or n_trained != 2 * len(layers):
        return None
    return dtypes.pop()


def give_working_copies(layers: list[LoraLinear], optimizer: FlatAdamW) -> None:
    """Let the layers multiply with the copies that the optimizer keeps of their A and B."""
    for layer in layers:
        of_a, of_b = optimizer.working_copy(layer.lora_A), optimizer.working_copy(layer.lora_B)
        layer.working_copies = None if of_a is None or of_b is None else (of_a, of_b)
