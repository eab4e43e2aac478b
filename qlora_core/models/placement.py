"""Where a model goes and what it computes in: refuses the devices and dtypes that there are not."""

from __future__ import annotations

import torch

from qlora_core.errors import ConfigError
from qlora_core.quant.checks import FLOATS
from qlora_core.quoting import quoted


def find_device(device: object) -> torch.device:
    """Give the device that the caller means.

    Raises:
        ConfigError: it is neither a CPU nor a GPU of this machine.
    """
    try:
        found = torch.device(device)  # pyright: ignore[reportCallIssue, reportArgumentType]
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu or cuda, not {quoted(device)}")
    if found.type == "cuda":
        gpus = torch.cuda.device_count()
        if gpus == 0:
            raise ConfigError(f"device is {found}, but there is no GPU here that torch can use")
        if found.index is not None and found.index >= gpus:
            raise ConfigError(f"device is {found}, but there are GPUs from 0 to {gpus - 1} only")
    return found


def usual_compute_dtype(device: torch.device | str) -> torch.dtype:
    """Give what products are computed in unless told otherwise: float32 on a CPU, else bfloat16, or float16 without it.

    Cards before Ampere, such as T4 and V100, only emulate bfloat16, which torch counts unless it is asked not to.
    """
    if torch.device(device).type == "cpu":
        return torch.float32
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float16


def check_compute_dtype(dtype: object) -> None:
    """Refuse what no model computes in; raises ConfigError."""
    if dtype not in FLOATS:
        allowed = "torch.float16, torch.bfloat16 or torch.float32"
        raise ConfigError(f"compute_dtype must be {allowed}, not {quoted(dtype)}")
