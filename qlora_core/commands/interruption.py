"""Ctrl-C and SIGTERM while a run trains: the first is a wish that the run hears after its step, the second ends it."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import Any, Self

_HEARD = (signal.SIGINT, signal.SIGTERM)
_STDERR = 2
_WORDS = b"\nStopping after this step; once more to stop at once.\n"


class StopWish:
    """Notes a signal while the block runs; call it to hear whether one came.

    Attributes:
        signal: that came, None as long as none did.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for one in _HEARD:
            self._before[one] = signal.signal(one, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()

    def __call__(self) -> bool:
        """Whether to stop; what `train` asks before each step."""
        return self.signal is not None

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self._give_back()
        with suppress(OSError):  # in a pipeline Ctrl-C has ended the reader, too
            os.write(_STDERR, _WORDS)

    def _give_back(self) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)
