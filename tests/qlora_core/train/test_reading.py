"""What is told of a file while it is read."""

from __future__ import annotations

from qlora_core.train import DatasetProgress, Event
from qlora_core.train.reading import tell_reading


def test_every_tenth_of_a_large_file_is_told_once() -> None:
    events: list[Event] = []
    tell = tell_reading(events.append)

    for done in (0, 1 << 20, 3 << 20, 3 << 20, 12 << 20, 39 << 20, 40 << 20, 40 << 20):
        tell(done, 40 << 20)

    assert events == [DatasetProgress(done << 20, 40 << 20) for done in (12, 39, 40)]
    assert events[0].as_dict() == {
        "kind": "dataset_progress", "done_bytes": 12 << 20, "total_bytes": 40 << 20,
    }  # fmt: skip


def test_of_a_small_file_nothing_is_told() -> None:
    events: list[Event] = []

    tell_reading(events.append)(1000, 1000)

    assert events == []
