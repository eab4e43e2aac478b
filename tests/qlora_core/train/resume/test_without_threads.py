"""Resume points where the system starts no more threads, as it does where memory has nearly ended."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.qlora_core.train.resume.tiny_points import TinyRun, taken


def _no_thread(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")  # CPython's words


def test_a_point_is_written_and_old_ones_go_where_no_thread_can_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading.Thread, "start", _no_thread)
    run = TinyRun()

    for step in (1, 2, 3):
        run.write(tmp_path, step)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-3"]
    assert taken(tmp_path) == (3, [])
