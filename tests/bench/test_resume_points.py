"""The bench of resume points measures what it says: whole points, and as many bytes in one file."""

from pathlib import Path

from bench.resume_points import measure


def test_points_and_plain_files_take_turns_and_nothing_is_left(tmp_path: Path) -> None:
    row = measure("tiny", 3, 64, rounds=2, parent=tmp_path)

    elements = 3 * 16 * 64
    assert row["bytes"] > 3 * 4 * elements  # the adapter and two moments
    assert len(row["ratios"]) == 2
    assert min(row["point_s"], row["floor_s"], row["ratio"]) > 0
    assert list(tmp_path.iterdir()) == []
