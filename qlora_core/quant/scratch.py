"""Working memory that each thread keeps between calls."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class _Kept(threading.local):
    """The calling thread's bytes, by name."""

    def __init__(self) -> None:
        self.memory: dict[str, Tensor] = {}


_kept = _Kept()


def scratch(name: str, n: int, dtype: torch.dtype) -> Tensor:
    """Give memory of ``dtype`` [n] on the CPU that holds anything, the same again for the same name.

    Kept, because touching fresh pages costs as much as the work in them. Made outside of inference
    mode whatever the caller's, since it can then be written in both.
    """
    size = n * dtype.itemsize
    memory = _kept.memory.get(name)
    if memory is None or memory.numel() < size:
        with torch.inference_mode(mode=False):
            memory = _kept.memory[name] = torch.empty(size, dtype=torch.uint8, device="cpu")
    return memory[:size].view(dtype)
