"""Whatever happens to the files of resume points, the newest whole one is taken, with the numbers that were written.

A hundred faults in all: flipped bits, files that may not grow, full disks, and writers that are killed.
"""

from __future__ import annotations

import errno
import json
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.qlora_core.train.resume.full_disks import NOT_ALLOWED
from tests.qlora_core.train.resume.tiny_points import TinyRun, taken

_SEED = 20261124


@pytest.fixture
def drawn() -> random.Random:
    """Faults at places that nobody has chosen, the same in each run."""
    return random.Random(_SEED)


def _flip_a_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_point_with_a_flipped_bit_is_refused_and_the_one_before_taken(
    count: int, drawn: random.Random, tmp_path: Path
) -> None:
    run = TinyRun()
    run.write(tmp_path, 1)
    newest = run.write(tmp_path, 2)
    files = sorted(newest.iterdir())
    outcomes: list[tuple[int | None, list[str]]] = []

    for _ in range(count):
        path = drawn.choice(files)
        bit = drawn.randrange(8 * path.stat().st_size)
        _flip_a_bit(path, bit)
        outcomes.append(taken(tmp_path))
        _flip_a_bit(path, bit)

    assert outcomes == [(1, ["step-2"])] * count
    assert taken(tmp_path) == (2, [])


@pytest.mark.parametrize("count", [15, pytest.param(300, marks=pytest.mark.slow)])
def test_where_a_file_cannot_grow_the_last_point_is_taken_and_nothing_is_left_of_the_next(
    count: int, drawn: random.Random, tmp_path: Path
) -> None:
    run = TinyRun()
    largest = max(path.stat().st_size for path in run.write(tmp_path, 1).iterdir())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    for step in range(2, count + 2):
        resource.setrlimit(resource.RLIMIT_FSIZE, (drawn.randrange(largest), before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                run.write(tmp_path, step)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

        assert taken(tmp_path) == (step - 1, [])
        assert all(path.name.startswith("step-") for path in tmp_path.iterdir())
        run.write(tmp_path, step)


def _told(module: str, folder: Path, count: int) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.qlora_core.train.resume.{module}", folder, str(_SEED), str(count)],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    if done.returncode == NOT_ALLOWED:
        pytest.skip("this machine lets nobody mount a file system of their own")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("count", [15, pytest.param(300, marks=pytest.mark.slow)])
def test_where_the_disk_is_full_the_last_point_is_taken_and_nothing_is_left_of_the_next(
    count: int, tmp_path: Path
) -> None:
    told = _told("full_disks", tmp_path, count)

    assert len(told) == count
    for step, found in enumerate(told, start=2):
        assert found["errno"] == errno.ENOSPC
        assert (found["taken"], found["taken_then"]) == (step - 1, step)
        assert set(found["left"]) <= {f"step-{step - 1}", f"step-{step - 2}"}


@pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_writer_killed_at_any_moment_leaves_the_last_point_that_it_has_written_or_the_one_after_it(
    count: int, tmp_path: Path
) -> None:
    told = _told("killed_writers", tmp_path, count)

    assert len(told) == count
    assert all(found["refused"] == [] for found in told)
    assert all((found["taken"] or 0) - found["ended"] in (0, 1) for found in told)
    assert any(found["half_written"] for found in told)
