"""Learning rates as a pure function of the step, so that there is no schedule state to resume."""

from __future__ import annotations

import math

from qlora_core.errors import ConfigError

SCHEDULES = ("linear", "cosine", "constant")


def learning_rate_at(
    step: int, *, kind: str, peak: float, total_steps: int, warmup_steps: int
) -> float:
    """Return the learning rate of optimizer step ``step``, counted from 0.

    Over the first ``warmup_steps`` it rises linearly, from one share of ``peak`` (never from 0: that
    step would be wasted) to ``peak``. Then, with ``x`` the share of the remaining steps that is
    done: linear ``peak * (1 - x)``; cosine ``peak * (1 + cos(pi * x)) / 2``; constant ``peak``.

    Args:
        step: from 0 to ``total_steps - 1``.
        kind: one of ``SCHEDULES``.
        peak: the highest rate.
        total_steps: of the whole run.
        warmup_steps: of its beginning; more than ``total_steps`` means that the peak is never reached.

    Raises:
        ConfigError: no schedule has this name.
    """
    if kind not in SCHEDULES:
        raise ConfigError(f"lr_scheduler_type must be one of {', '.join(SCHEDULES)}, not {kind!r}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if kind == "linear":
        return peak * (1 - done)
    if kind == "cosine":
        return peak * (1 + math.cos(math.pi * done)) / 2
    return peak


def warmup_share(ratio: float, total_steps: int) -> int:
    """Return how many steps of warm-up a share of all steps is: a part of a step is a whole one."""
    # In floats 0.07 of 100 is a little more than 7.
    return math.ceil(ratio * total_steps - 1e-9)
