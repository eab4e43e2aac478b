"""Chooses how an optimizer's moments are paged between a GPU and the host.

Unified memory where CUDA has it with concurrent access (Linux with a GPU of the last ten years), else
pinned memory, with the reason told. On a CPU there is nothing to page: it is plain memory.
"""

from __future__ import annotations

import torch

from qlora_core.errors import DeviceError
from qlora_core.optim.pinned_memory import PinnedMemory
from qlora_core.optim.state_memory import Bits, PlainMemory, StateMemory
from qlora_core.optim.unified_memory import UnifiedMemory


def open_paged_memory(n: int, bits: Bits, device: torch.device) -> StateMemory:
    """Take memory for the moments of n elements, a multiple of 1024, that leaves the GPU between steps."""
    if device.type != "cuda":
        return PlainMemory(n, bits, device)
    try:
        return UnifiedMemory(n, bits, device)
    except DeviceError as error:
        notice = (
            f"Optimizer state is paged through pinned memory, not unified memory: {error.message}"
        )
        return PinnedMemory(n, bits, device, notice=notice)
