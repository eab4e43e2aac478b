"""The optimizers' bench runs, its contenders do the same work, and its figures are what it says; how fast they are is nobody's test."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import optimizer_process
from bench.kept_file import OtherSettings, keep, open_kept
from bench.optimizer import astray, plan, summary, table
from bench.optimizer_process import ADAPTERS, CONTENDERS, measure, tensors

ROOT = Path(__file__).resolve().parents[2]
SMALL = "a single layer, for tests"


def run(contender: str, ms: float, *, moved: float = 1.0, copy_ms: float = 0.5) -> dict[str, Any]:
    return {
        "size": SMALL, "threads": 2, "turn": 0, "contender": contender, "elements": 1000, "tensors": 2, "moved": moved,
        "state_bytes": 2063, "step_ms": ms - 1, "clip_and_step_ms": ms, "copy_ms": copy_ms,
    }  # fmt: skip


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What each contender's process would tell of the small adapter."""
    monkeypatch.setattr(optimizer_process, "SECONDS", 0.0)
    each: dict[str, dict[str, Any]] = {}
    for name, build in CONTENDERS.items():
        params = tensors(ADAPTERS[SMALL])
        each[name] = measure(build(params), params)
    return each


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_all_contenders_move_the_same_weights_by_the_same_distance(
    found: dict[str, dict[str, Any]],
) -> None:
    distances = [one["moved"] for one in found.values()]

    assert len(found) >= 7
    # Three steps of at most the rate for each of 3,056 elements, towards where the gradients point.
    assert 0.5 < distances[0] / (3 * optimizer_process.RATE * 3056**0.5) < 1
    assert distances == pytest.approx([distances[0]] * len(distances), rel=0.01)
    assert {one["elements"] for one in found.values()} == {3056}


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_the_states_bytes_are_counted_once_and_with_all_that_is_beside_them(
    found: dict[str, dict[str, Any]],
) -> None:
    # Two moments of four bytes, and a count of steps for each of fourteen tensors.
    assert found["torch AdamW, fused"]["state_bytes"] == 2 * 4 * 3056 + 4 * 14
    # bitsandbytes keeps moments of tensors so small in 32 bits, and counts in Python.
    assert found["bitsandbytes AdamW8bit"]["state_bytes"] == 2 * 4 * 3056
    # Each tensor in whole blocks of 256, all of them in whole tiles of 1,024: 5 of them.
    assert found["ours adamw_8bit"]["state_bytes"] == 2 * (5120 + 4 * 20) + 4 * 14


def test_the_large_adapter_is_that_of_a_model_of_8_billion_parameters_at_rank_16() -> None:
    elements = sum(rows * columns for rows, columns in ADAPTERS["Llama-3.1-8B, r=16"])

    assert elements == 41_943_040  # as peft counts it


def test_a_step_is_told_beside_its_rival_and_beside_a_copy_of_the_bytes_that_it_needs() -> None:
    runs = [run("torch AdamW, fused", 4.0), run("bitsandbytes AdamW8bit", 30.0), run("ours adamw_8bit", 12.0),
            run("ours adamw_8bit", 10.0), run("ours adamw_8bit", 11.0)]  # fmt: skip

    rows = {row["contender"]: row for row in summary(runs)}

    # 32 bytes where a copy moves 8 in half a millisecond; 20 and a sixteenth.
    assert rows["torch AdamW, fused"]["share_of_copy"] == pytest.approx(2.0 / 4.0)
    assert rows["ours adamw_8bit"]["share_of_copy"] == pytest.approx(20.0625 / 16 / 11.0)
    (line,) = [line for line in table(list(rows.values())) if "ours" in line]
    assert "2.063 bytes per element" in line
    assert "11.00 ms [10.00 to 12.00]" in line
    assert line.endswith("2.73 x bitsandbytes AdamW8bit")


def test_a_contender_that_moved_the_weights_elsewhere_is_named() -> None:
    runs = [run("torch AdamW, fused", 4.0), run("ours adamw", 4.0, moved=1.005), run("ours adamw_8bit", 4.0, moved=1.02)]  # fmt: skip

    (told,) = astray(summary(runs))

    assert told.startswith("ours adamw_8bit moved")


def test_contenders_take_turns_so_that_a_drift_hits_all() -> None:
    turns = [contender for _, _, _, contender in plan(["small"], [2], 3)]

    names = list(CONTENDERS)
    assert turns == [*names, *reversed(names), *names]


def test_a_file_of_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "kept.json"
    keep(open_kept(file, {"load": 1.0}, {"cpu": "one"}), file)

    assert open_kept(file, {"load": 2.0}, {"cpu": "one"}) == {"runs": [], "load": 1.0, "cpu": "one"}
    with pytest.raises(OtherSettings, match="is of other settings"):
        open_kept(file, {}, {"cpu": "another"})
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]


@pytest.mark.slow
def test_the_whole_runs_process_by_process_and_goes_on_where_it_was(tmp_path: Path) -> None:
    file = tmp_path / "kept.json"
    command = [
        sys.executable, "-m", "bench.optimizer", "--sizes", SMALL, "--threads", "1", "--rounds", "1", "--file", file,
    ]  # fmt: skip

    def bench(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=280
        )

    none, whole = bench("--minutes", "0"), bench()
    kept = file.read_bytes()
    again = bench()

    assert (none.returncode, "The time is up" in none.stdout) == (0, True)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert [one["contender"] for one in json.loads(kept)["runs"]] == list(CONTENDERS)
    assert "All contenders moved the weights by the same distance." in whole.stdout
    assert file.read_bytes() == kept
    assert again.stdout.splitlines()[1:-2] == whole.stdout.splitlines()[1:-2]
