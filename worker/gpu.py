"""Which GPUs there are, asked of the driver (NVML): the worker's parent must not load torch, nor touch CUDA."""

# pyright: reportUnknownMemberType=false
import os
from dataclasses import dataclass

import pynvml  # pyright: ignore[reportMissingTypeStubs]


@dataclass(frozen=True)
class Gpu:
    """One GPU that this worker may use."""

    uuid: str
    name: str
    memory_bytes: int
    driver: str | None = None


def discover() -> list[Gpu]:
    """Return the GPUs that the driver shows and CUDA_VISIBLE_DEVICES allows; none where there is no driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        found = [_describe(index, driver) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()
    return _allowed(found, os.environ.get("CUDA_VISIBLE_DEVICES"))  # noqa: TID251  (the driver's own)


def free_memory(gpu: Gpu) -> int | None:
    """Return how much of the GPU's memory nobody uses now; None: the driver does not say."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _describe(index: int, driver: str) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    return Gpu(
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        driver=driver,
    )


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _allowed(found: list[Gpu], visible: str | None) -> list[Gpu]:
    """Apply CUDA_VISIBLE_DEVICES as CUDA does: numbers or UUIDs (or their starts), ended by the first unknown one."""
    if visible is None:
        return found
    allowed: list[Gpu] = []
    for name in (part.strip() for part in visible.split(",")):
        if name.isdigit() and int(name) < len(found):
            allowed.append(found[int(name)])
            continue
        matches = [gpu for gpu in found if name and gpu.uuid.startswith(name)]
        if len(matches) != 1:
            break
        allowed.append(matches[0])
    return allowed
