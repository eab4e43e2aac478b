"""How busy a GPU is just now, as its driver (NVML) says; of all processes on it, not of ours alone."""

# pyright: reportUnknownMemberType=false
from dataclasses import dataclass

import pynvml  # pyright: ignore[reportMissingTypeStubs]

from worker.gpu import Gpu


@dataclass(frozen=True)
class GpuLoad:
    """`utilization`: the share of the last moments in which a kernel ran, 0 to 1; None: the driver does not say (MIG)."""

    memory_used_bytes: int
    utilization: float | None


def load_of(gpu: Gpu) -> GpuLoad | None:
    """Ask the driver; None: it does not answer."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
        used = int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
        return GpuLoad(used, _utilization(handle))
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _utilization(handle: object) -> float | None:
    try:
        return int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
    except pynvml.NVMLError:
        return None
