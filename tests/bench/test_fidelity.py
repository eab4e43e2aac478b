"""The table of what each storage format costs in quality, made of little text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_format_gets_a_row_and_the_formats_rank_as_their_errors_do(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.fidelity", "--tokens", "1025", "--results", tmp_path]

    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)

    assert result.returncode == 0, result.stderr
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    rows = {row["name"]: row for row in kept["rows"]}
    assert list(rows) == [
        "16-bit",
        "int8",
        "int4",
        "FP4",
        "FP4 E2M1",
        "NF4",
        "NF4+DQ",
        "NF4 mse",
        "NF4+DQ mse",
    ]
    assert rows["16-bit"]["mean_squared_error"] == rows["16-bit"]["divergence"] == 0
    assert round(rows["NF4+DQ"]["bits_per_parameter"], 3) == 4.127
    best_first = ["int8", "NF4 mse", "NF4", "int4", "FP4"]
    assert sorted(best_first, key=lambda name: rows[name]["mean_squared_error"]) == best_first
    assert sorted(best_first, key=lambda name: rows[name]["divergence"]) == best_first
    assert kept["squared_error_removed_by_mse"]["all"]["NF4+DQ"] > 0.1


def test_too_little_text_is_refused_with_a_sentence() -> None:
    command = [sys.executable, "-m", "bench.fidelity", "--tokens", "256"]

    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert result.returncode == 2
    assert "--tokens must be more than 256" in result.stderr
