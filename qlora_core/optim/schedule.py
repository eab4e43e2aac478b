"""Learning rates as a pure function of the step, so that there is no schedule state to resume."""

from __future__ import annotations

import math

from qlora_core.errors import ConfigError

SCHEDULES = ("linear", "cosine", "constant")


def learning_rate_at(
    step: int, *, kind: str, peak: float, total_steps: int, warmup_ratio: float
) -> float:
    """Return the learning rate of optimizer step ``step``, counted from 0.

    Over the first ``ceil(warmup_ratio * total_steps)`` steps it rises linearly, from one share of
    ``peak`` (never from 0: that step would be wasted) to ``peak``. Then, with ``x`` the share of the
    remaining steps that is done: linear ``peak * (1 - x)``; cosine ``peak * (1 + cos(pi * x)) / 2``;
    constant ``peak``.

    Raises:
        ConfigError: no schedule has this name.
    """
    if kind not in SCHEDULES:
        raise ConfigError(f"lr_scheduler_type must be one of {', '.join(SCHEDULES)}, not {kind!r}")
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if kind == "linear":
        return peak * (1 - done)
    if kind == "cosine":
        return peak * (1 + math.cos(math.pi * done)) / 2
    return peak
