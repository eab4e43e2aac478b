"""Which examples an optimizer step sees: a shuffle that depends on seed and epoch alone.

A run that resumes in the middle of an epoch draws the same order again and skips what is done.
"""

from __future__ import annotations

import random


def epoch_order(n_examples: int, *, seed: int, epoch: int) -> list[int]:
    """Return a shuffle of ``range(n_examples)``, the same for the same seed and epoch everywhere."""
    order = list(range(n_examples))
    random.Random(f"{seed}:{epoch}").shuffle(order)  # noqa: S311 - an order, not a secret
    return order


def windows(order: list[int], batch_size: int) -> list[list[int]]:
    """Cut an epoch into the examples of each optimizer step; the last may be smaller."""
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
