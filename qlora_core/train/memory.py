"""Measured memory of the process or the card, and one error for running out of it."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from qlora_core.errors import OutOfMemoryError

_PAGE_BYTES = resource.getpagesize()
_STATM = Path("/proc/self/statm")


def measured_memory(device: torch.device) -> dict[str, int]:
    """Return memory in use by kind.

    On a GPU: ``allocated_bytes`` and ``reserved_bytes`` now, ``peak_bytes`` allocated at most. On a
    CPU: ``rss_bytes`` now, ``peak_rss_bytes`` at most (of the process, since it started).
    """
    if device.type == "cuda":
        return {
            "allocated_bytes": torch.cuda.memory_allocated(device),
            "reserved_bytes": torch.cuda.memory_reserved(device),
            "peak_bytes": torch.cuda.max_memory_allocated(device),
        }
    peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rss_bytes = peak_rss_bytes
    if _STATM.is_file():
        rss_bytes = int(_STATM.read_text().split()[1]) * _PAGE_BYTES
    return {"rss_bytes": rss_bytes, "peak_rss_bytes": max(peak_rss_bytes, rss_bytes)}


def base_bytes(model: nn.Module) -> int:
    """Return the bytes of everything frozen: parameters and buffers, shared ones once."""
    tensors = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


@contextmanager
def out_of_memory_named(device: torch.device) -> Iterator[None]:
    """Turn the several ways a device runs out of memory into our one error."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        used = ", ".join(f"{name} {value:,}" for name, value in measured_memory(device).items())
        raise OutOfMemoryError(
            f"The {device.type} ran out of memory ({used}). Lower micro_batch_tokens or "
            "context_length, or turn gradient_checkpointing on."
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # torch raises a plain RuntimeError where the CPU's allocator fails.
    return "can't allocate memory" in str(error)
