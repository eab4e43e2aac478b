"""What the GPU bench keeps: every group at once, so that a run that is cut off goes on where it was."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import on_gpu
from bench.gpu.groups import Group, Rows
from bench.gpu.results import Results


def _results(folder: Path, *, commit: str = "abc1234", again: bool = False) -> Results:
    return Results(folder, "cpu", commit=commit, again=again)


def test_a_second_run_of_a_commit_has_what_the_first_kept(tmp_path: Path) -> None:
    _results(tmp_path).keep("dequantize 1x1", [{"ms": 1.5}])

    assert _results(tmp_path).groups == {"dequantize 1x1": [{"ms": 1.5}]}
    assert _results(tmp_path, commit="def5678").groups == {}
    assert _results(tmp_path, again=True).groups == {}


def test_the_file_says_what_it_was_measured_on(tmp_path: Path) -> None:
    results = _results(tmp_path)
    results.keep("checks", [{"wrong_codes": 0}])

    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())

    assert file.name == "on_gpu-cpu-abc1234.json"
    assert kept["device"] == "cpu"
    assert kept["commit"] == "abc1234"
    assert {"python", "torch", "triton", "cuda"} <= set(kept["versions"])
    assert any("driver_version" in key for key in kept)


def test_only_counts_of_wrong_things_make_a_group_wrong(tmp_path: Path) -> None:
    results = _results(tmp_path)
    results.keep("checks good", [{"wrong_codes": 0, "differing_codes": 3}])
    results.keep("checks bad", [{"wrong_codes": 0}, {"wrong_values": 2}])

    assert results.wrong() == ["checks bad"]


def test_a_run_whose_time_is_up_goes_on_with_what_it_has_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    now_s = 0.0

    def group(name: str, seconds: float = 0.0) -> Group:
        def run() -> Rows:
            nonlocal now_s
            now_s += seconds
            done.append(name)
            return [{"ms": 1.0}]

        return Group(name, run)

    groups = [group("checks short"), group("checks long", 20), group("quantize")]
    monkeypatch.setattr(on_gpu, "time", SimpleNamespace(monotonic=lambda: now_s))

    first = on_gpu._run(groups, _results(tmp_path), 10)
    second = on_gpu._run(groups, _results(tmp_path), 60)

    assert first == (["quantize"], [])
    assert second == ([], [])
    assert done == ["checks short", "checks long", "quantize"]


def test_a_group_that_fails_is_named_kept_nowhere_and_costs_no_other(tmp_path: Path) -> None:
    def fail() -> Rows:
        raise RuntimeError("no such kernel")

    results = _results(tmp_path)
    groups = [Group("checks", fail), Group("quantize", lambda: [{"ms": 1.0}])]

    left, failed = on_gpu._run(groups, results, time.monotonic() + 60)

    assert (left, failed) == ([], ["checks"])
    assert list(_results(tmp_path).groups) == ["quantize"]
