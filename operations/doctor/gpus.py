"""Which GPUs are here, and does a Triton kernel run on each that nobody uses?

A GPU that a worker holds is not tried: a second process there takes memory from the job that trains. Its worker tried it.
"""

from importlib.util import find_spec

from operations.doctor.finding import Finding, fail, ok, warn
from worker import gpu
from worker.locks import gpu_lock_path, try_lock
from worker.probe import why_unusable
from worker.spawn import child_environment


def examine_gpus(*, probe: bool = True) -> list[Finding]:
    """Examine each; `probe`: launch a kernel on it, which takes some seconds."""
    found = gpu.discover()
    if not found:
        return [ok("gpu", "no NVIDIA GPU, or no driver, here: jobs train on the CPU")]
    return [_examine(one, probe=probe) for one in found]


def _examine(one: gpu.Gpu, *, probe: bool) -> Finding:
    words = f"{one.name}, driver {one.driver or 'unknown'}, {one.uuid}"
    lock = try_lock(gpu_lock_path(one.uuid))
    if lock is None:
        return ok("gpu", f"{words}: a worker has it")
    try:
        if not probe:
            return ok("gpu", f"{words}: not tried")
        if find_spec("torch") is None:
            return warn("gpu", words, "pip install 'nibble[engine]' to train on it")
        problem = why_unusable(child_environment() | {"CUDA_VISIBLE_DEVICES": one.uuid})
    finally:
        lock.release()
    return (
        ok("gpu", f"{words}: a Triton kernel runs")
        if problem is None
        else fail("gpu", words, problem)
    )
