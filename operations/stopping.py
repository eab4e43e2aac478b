"""Ctrl-C, SIGTERM and a closed terminal end a command in the same orderly way."""

import signal
import time
from types import FrameType
from typing import NoReturn

_SAME_WISH_S = 1.0
"""`timeout` and `make` send a signal twice; only a later one means that somebody is impatient."""


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end; `exit_code` is what shells expect for it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def stop_on_signals() -> None:
    """Raise `Stopped` in the main thread from now on; again for an impatient second signal, which cuts waits short."""
    first_at: float | None = None

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal first_at
        now = time.monotonic()
        if first_at is None or now - first_at > _SAME_WISH_S:
            first_at = first_at or now
            _raise(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)


def _raise(number: int) -> NoReturn:
    raise Stopped(number)
