"""Which device a kernel launch goes to."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the current one: Triton launches on the current GPU, whatever its arguments'.

    Nothing to do for CPU tensors, which only Triton's interpreter takes.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
