"""Times GPU work: by CUDA events, with a cold L2 cache, medians, and in A-B-A order.

Before each sample a large buffer is read through the cache (read, not written: lines that wait to be
written would be paid for by the sample), and the GPU is kept busy for as long as the CPU needs to
queue what is timed, so that a sample holds no launch latency. A call that waits for the GPU itself
(a public one that checks its input) shows that waiting.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Action = Callable[[], object]

# Larger than any GPU's L2 cache.
_FLUSH_BYTES = 256 * 1024 * 1024
# Clock cycles, some 200 microseconds.
_BUSY_CYCLES = 400_000
_ROUNDS = 3
_SAMPLES = 10
_WARM_UPS = 3


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median of all samples, and the lowest and highest median of a round."""

    ms: float
    low_ms: float
    high_ms: float


def time_all(actions: dict[str, Action], device: str) -> dict[str, Timing]:
    """Time actions beside each other: each round goes through all of them and back.

    Args:
        actions: by name; each is called some sixty times.
        device: ``cuda``, or ``cpu`` to try the code, when one sample is taken by the clock.
    """
    if device != "cuda":
        return {name: _once(action) for name, action in actions.items()}
    flush = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    for action in actions.values():
        for _ in range(_WARM_UPS):
            action()
    medians: dict[str, list[float]] = {name: [] for name in actions}
    samples: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(_ROUNDS):
        for name in [*actions, *reversed(actions)]:
            taken = [_sample(actions[name], flush) for _ in range(_SAMPLES)]
            medians[name].append(statistics.median(taken))
            samples[name] += taken
    return {
        name: Timing(statistics.median(samples[name]), min(medians[name]), max(medians[name]))
        for name in actions
    }


def _sample(action: Action, flush: Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.amax()
    torch.cuda._sleep(_BUSY_CYCLES)  # noqa: SLF001 - torch has no other way to keep a GPU busy
    begin.record()
    action()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _once(action: Action) -> Timing:
    began = time.perf_counter()
    action()
    ms = 1e3 * (time.perf_counter() - began)
    return Timing(ms, ms, ms)
