"""How many bytes of tensors a device has room for beside those that are there: what would fit is reckoned from it.

Freed memory that an allocator keeps counts as room.
"""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
# Limits of a process, with what of it counts towards each.
_LIMITS = ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize"))


def free_bytes(device: torch.device) -> int | None:
    """Return the room, as the driver or the system tell it; None where they do not."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    if device.type != "cpu" or not _STATUS.is_file() or not _MEMINFO.is_file():
        return None
    used = _kilobytes(_STATUS)
    rooms = [_kilobytes(_MEMINFO)["MemAvailable"]]
    # What malloc holds and nobody uses; threads' stacks are taken for it, too.
    idle = used["VmData"] - used["RssAnon"]
    for limit, counted in _LIMITS:
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            rooms.append(most - used[counted] + idle)
    return max(0, min(rooms))


def return_freed() -> None:
    """Have caches of freed memory given back: glibc's, and those of torch for a GPU."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _kilobytes(path: Path) -> dict[str, int]:
    """Return in bytes what a file of the system gives in kB, by name."""
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    return {parts[0].rstrip(":"): int(parts[1]) * 1024 for parts in lines if parts[-1] == "kB"}
