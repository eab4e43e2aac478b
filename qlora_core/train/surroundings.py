"""What of torch's process-wide state a run sets: threads, and algorithms that give the same bits each time.

All of it is the caller's again when the run is over, but for cuBLAS' setting, which the process keeps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

from qlora_core.train.plan import ExecutionPlan

# cuBLAS takes its workspace from here once, when it is first used; with this one its sums have one order.
_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Properties of a module, which type checkers do not see.
_memory: Any = torch.utils.deterministic


@contextmanager
def callers_kept() -> Iterator[None]:
    """Put threads and determinism back as they were, however the block ends."""
    threads = torch.get_num_threads()
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = _memory.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        _memory.fill_uninitialized_memory = fill


def surround(plan: ExecutionPlan, *, strict: bool = False) -> None:
    """Set what the plan says; ``strict``: an algorithm that is not deterministic raises RuntimeError, and does not only warn."""
    if torch.get_num_threads() != plan.threads:
        torch.set_num_threads(plan.threads)
    if plan.deterministic and plan.device != "cpu":
        os.environ.setdefault(*_WORKSPACE)  # noqa: TID251 - torch itself reads it there
    torch.use_deterministic_algorithms(plan.deterministic, warn_only=not strict)
    # Determinism does not need it, and it writes to all memory twice.
    _memory.fill_uninitialized_memory = False
