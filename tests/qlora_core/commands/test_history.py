"""A run's events as curves and figures, also where the run was killed and went on."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_core.commands.history import History, read_history
from qlora_core.commands.loss_curve import draw_loss_curve, smoothed


def started(step: int = 0) -> dict[str, Any]:
    return {"kind": "run_started", "start_step": step}


def stepped(step: int, loss: float | None, **memory: int) -> dict[str, Any]:
    return {
        "kind": "step_metrics",
        "step": step,
        "train_loss": loss,
        "step_time_s": 0.5,
        "tokens_per_s": 100.0,
        "memory": memory,
    }


def validated(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "validation_metrics", "step": step, "full_valid_loss": loss}


def test_what_was_done_again_counts_once() -> None:
    events = [
        started(), validated(0, 9.0), stepped(1, 5.0), stepped(2, 4.0), stepped(3, 3.0), validated(3, 3.5),
        started(1), stepped(2, 4.5),
    ]  # fmt: skip

    history = read_history(events)

    assert history.train == {1: 5.0, 2: 4.5}
    assert history.validation == {0: 9.0}
    assert sum(history.seconds.values()) == 1.0
    assert sum(history.tokens.values()) == 100.0


def test_a_skipped_step_has_no_loss_but_took_its_time() -> None:
    history = read_history([started(), stepped(1, None), stepped(2, 4.0)])

    assert history.train == {2: 4.0}
    assert sum(history.seconds.values()) == 1.0


def test_the_peak_is_that_of_the_device() -> None:
    on_cpu = [stepped(1, 1.0, rss_bytes=5, peak_rss_bytes=9), stepped(2, 1.0, peak_rss_bytes=7)]
    on_gpu = [stepped(1, 1.0, allocated_bytes=5, peak_bytes=8)]

    assert read_history(on_cpu).peak_bytes == 9
    assert read_history(on_gpu).peak_bytes == 8


def test_samples_are_kept_by_who_answered() -> None:
    samples = [{"messages": [], "answer": "No."}]

    history = read_history([{"kind": "samples_generated", "stage": "base", "samples": samples}])

    assert history.samples == {"base": samples}


def test_the_smoothed_line_is_a_mean_of_what_came_before() -> None:
    assert smoothed([]) == []
    assert smoothed([3.0] * 100) == pytest.approx([3.0] * 100)
    # fewer than twenty values: none is kept longer than a step
    assert smoothed([1.0, 2.0]) == [1.0, 2.0]
    # of forty, each weighs half of the next
    assert smoothed([4.0, 1.0, *[0.0] * 38])[:2] == [4.0, (4.0 / 2 + 1.0) / 1.5]


def test_the_picture_is_a_png_and_drawn_again_over_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "loss.png"
    history = History(train={n: 5 / n for n in range(1, 30)}, validation={0: 6.0, 29: 1.0})

    assert draw_loss_curve(History(train={1: 5.0}), path)
    small = path.stat().st_size
    assert draw_loss_curve(history, path)

    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", content[16:24]) == (1200, 750)
    assert path.stat().st_size > small
    assert [one.name for one in tmp_path.iterdir()] == ["loss.png"]


def test_without_a_step_or_without_matplotlib_there_is_no_picture(tmp_path: Path) -> None:
    assert not draw_loss_curve(History(validation={0: 1.0}), tmp_path / "loss.png")
    script = (
        "import sys\n"
        "sys.modules['matplotlib.figure'] = None\n"  # as if it were not installed
        "from pathlib import Path\n"
        "from qlora_core.commands.history import History\n"
        "from qlora_core.commands.loss_curve import draw_loss_curve\n"
        "assert not draw_loss_curve(History(train={1: 1.0}), Path(sys.argv[1]))\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "loss.png"],
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    assert [*tmp_path.iterdir()] == []
