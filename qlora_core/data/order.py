"""Which examples an optimizer step sees: a shuffle that depends on seed and epoch alone.

A run that resumes in the middle of an epoch draws the same order again and skips what is done.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Sequence
from typing import overload


def epoch_order(n_examples: int, *, seed: int, epoch: int) -> array[int]:
    """Return a shuffle of ``range(n_examples)``, the same for the same seed and epoch everywhere; four bytes each."""
    order = array("i", range(n_examples))
    random.Random(f"{seed}:{epoch}").shuffle(order)  # noqa: S311 - an order, not a secret
    return order


class Windows(Sequence[list[int]]):
    """An epoch cut into the examples of each optimizer step; the last may be smaller. Made when they are asked for."""

    def __init__(self, order: Sequence[int], batch_size: int) -> None:
        self._order = order
        self._batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self._order) / self._batch_size)

    @overload
    def __getitem__(self, step: int) -> list[int]: ...
    @overload
    def __getitem__(self, step: slice) -> list[list[int]]: ...
    def __getitem__(self, step: int | slice) -> list[int] | list[list[int]]:
        if isinstance(step, slice):
            return [self[one] for one in range(*step.indices(len(self)))]
        start = range(len(self))[step] * self._batch_size
        return list(self._order[start : start + self._batch_size])


def windows(order: Sequence[int], batch_size: int) -> Windows:
    """Cut an epoch into the examples of each optimizer step."""
    return Windows(order, batch_size)
