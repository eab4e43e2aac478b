"""A process that makes no way between a wish that it end and its being told: a fast one would be done by then."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


@contextmanager
def held_until_told_to_end(process: psutil.Process) -> Iterator[None]:
    """Stop it; wish for its end inside the block; behind it SIGTERM waits for it, and it goes on."""
    process.suspend()
    try:
        yield
        deadline = time.monotonic() + 90
        while not _has_sigterm_waiting(process):
            assert time.monotonic() < deadline, "nobody tells it to end"
            time.sleep(0.01)
    finally:
        process.resume()


def _has_sigterm_waiting(process: psutil.Process) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    waiting = int(status.partition("ShdPnd:")[2].split()[0], 16)
    return bool(waiting >> (signal.SIGTERM - 1) & 1)
