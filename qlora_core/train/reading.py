"""Tells how far a large file has been read, as events of the run that it is for."""

from __future__ import annotations

from collections.abc import Callable

from qlora_core.train.events import DatasetProgress, Sink

# Smaller files are read before anyone would look.
_TOLD_FROM_BYTES = 8 << 20
_TIMES = 10


def tell_reading(sink: Sink) -> Callable[[int, int], None]:
    """Return an ``on_progress`` for `load_dataset` that tells ``sink`` of every tenth of a file that takes its time."""
    told = 0

    def tell(done_bytes: int, total_bytes: int) -> None:
        nonlocal told
        tenths = done_bytes * _TIMES // max(1, total_bytes)
        if total_bytes >= _TOLD_FROM_BYTES and tenths > told:
            told = tenths
            sink(DatasetProgress(done_bytes, total_bytes))

    return tell
