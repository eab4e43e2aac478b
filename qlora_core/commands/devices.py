"""Where a command computes, and in what."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from qlora_core.errors import ConfigError

if TYPE_CHECKING:
    import torch


class Device(StrEnum):
    """What a command can be told; auto is the GPU where there is one."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def choose_device(wanted: str) -> torch.device:
    """Give the device that is meant by one of `Device`.

    Raises:
        ConfigError: there is no GPU here.
    """
    import torch

    if wanted == Device.CUDA and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device here; use the CPU, or auto")
    on_gpu = wanted != Device.CPU and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def choose_compute_dtype(device: torch.device, wanted: str = "auto") -> torch.dtype:
    """Give a dtype by its name; "auto" is what `usual_compute_dtype` says."""
    import torch

    from qlora_core.models.placement import usual_compute_dtype

    return usual_compute_dtype(device) if wanted == "auto" else getattr(torch, wanted)
