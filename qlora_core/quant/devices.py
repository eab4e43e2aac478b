"""Which device tensors move to, and kernels are launched on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from qlora_core.errors import ConfigError


def check_device(device: torch.device | str) -> torch.device:
    """Give the device of that name; raises ConfigError for what is none, meta, or a GPU that is not here."""
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"{device!r} is no device") from error
    if wanted.type == "meta":
        raise ConfigError("on meta tensors hold no values: nothing can be moved there")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"there is no device {wanted} here")
    return wanted


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the current one: Triton launches on the current GPU, whatever its arguments'.

    Nothing to do for CPU tensors, which only Triton's interpreter takes.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
