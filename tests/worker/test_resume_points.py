"""Where a lost attempt is taken up: at the newest point on the disk, with its story up to there."""

import json
from pathlib import Path

from worker.folder import AttemptFolder
from worker.inputs import resume_point_in


def attempt(tmp_path: Path, *, told: list[tuple[str, int]], points: list[str]) -> AttemptFolder:
    """An attempt's folder whose child told of these kinds at these steps and left these points."""
    folder = AttemptFolder(tmp_path / "attempt")
    folder.create()
    for name in points:
        (folder.run / "resume" / name).mkdir(parents=True)
    lines = [
        {
            "n": n,
            "at": 1.0,
            "level": "info",
            "type": "message",
            "message": f"{kind} {step}",
            "data": {"kind": kind, "step": step},
        }
        for n, (kind, step) in enumerate(told, 1)
    ]
    folder.events.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_lines_after_the_newest_point_are_left_to_the_next_attempt(tmp_path: Path) -> None:
    told = [("step", 1), ("step", 2), ("resume_point_saved", 2), ("step", 3), ("step", 4)]
    folder = attempt(tmp_path, told=told, points=["step-2"])

    point = resume_point_in(folder, 7)

    assert point is not None
    assert (point.attempt_no, point.folder) == (7, folder.run / "resume")
    assert [line.n for line in point.lines] == [1, 2, 3]


def test_a_point_that_its_killed_child_had_no_time_to_tell_of_counts(tmp_path: Path) -> None:
    told = [
        ("step", 1),
        ("step", 2),
        ("resume_point_saved", 2),
        ("step", 3),
        ("checkpoint_saved", 3),
    ]
    folder = attempt(tmp_path, told=told, points=["step-2", "step-3"])

    point = resume_point_in(folder, 1)

    assert point is not None
    assert [line.n for line in point.lines] == [1, 2, 3, 4, 5]


def test_unfinished_points_and_other_names_do_not_count(tmp_path: Path) -> None:
    folder = attempt(
        tmp_path, told=[("step", 1)], points=[".step-3.0123abcd.unfinished", "step-x", "old"]
    )

    assert resume_point_in(folder, 1) is None
