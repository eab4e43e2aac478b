"""The table of moments in 32 and in 8 bits, its picture, and a bench that trains with each."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.loss_curves import draw
from bench.optimizer_convergence import FORMS, table

ROOT = Path(__file__).resolve().parents[2]


def _kept() -> dict[str, Any]:
    """Three seeds; in 8 bits they end 0.01, 0.02 and 0.03 higher."""
    forms = (("adamw", 0.0, 8000), ("adamw_8bit", 0.01, 2063), ("paged_adamw_8bit", 0.01, 2063))
    return {
        "model": "tiny", "examples": 8, "epochs": 1,
        "runs": [
            {"optimizer": name, "seed": seed, "adapter_bytes": 4000, "optimizer_bytes": state,
             "losses": {"0": 5.0, "4": 3.0 + seed / 10 + extra * (seed + 1)}}
            for seed in range(3)
            for name, extra, state in forms
        ],
    }  # fmt: skip


def test_the_table_tells_each_seed_the_spread_of_the_seeds_and_the_paired_differences() -> None:
    lines = table(_kept()["runs"]).splitlines()

    assert lines[0].split() == ["seed", "adamw", "adamw_8bit", "paged_adamw_8bit"]
    assert lines[1].split() == ["0", "3.0000", "3.0100", "3.0100"]
    assert lines[4].split() == ["mean", "3.1000", "3.1200", "3.1200"]
    assert lines[5].split() == ["standard", "deviation", "0.1000", "0.1100", "0.1100"]
    assert lines[6].split() == ["bytes", "per", "element", "8.0000", "2.0630", "2.0630"]
    # 4.303 * 0.01 / sqrt(3) around it.
    assert lines[7:9] == [
        "adamw_8bit less adamw: mean difference +0.0200 nats per token, standard deviation 0.0100",
        "adamw_8bit less adamw: 95% of the mean: -0.0048 to +0.0448",
    ]
    assert len(lines) == 11


def test_a_bench_that_was_cut_off_has_a_table_of_what_there_is() -> None:
    lines = table(_kept()["runs"][:4]).splitlines()

    assert lines[2].split() == ["1", "3.1000"]
    assert lines[3].split() == ["mean", "3.0500"]
    assert len(lines) == 6


def test_the_same_figures_give_the_same_picture(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        draw(_kept(), tmp_path / name, key="optimizer", forms=FORMS, title="difference")

    content = (tmp_path / "one.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content == (tmp_path / "two.png").read_bytes()


@pytest.mark.slow
def test_each_optimizer_is_trained_with_and_tells_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "kept.json"
    command = [
        sys.executable, "-m", "bench.optimizer_convergence", "--examples", "16", "--validation", "4", "--epochs", "1",
        "--seeds", "0", "--file", file,
    ]  # fmt: skip

    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)

    assert result.returncode == 0, result.stderr
    runs = {one["optimizer"]: one for one in json.loads(file.read_text())["runs"]}
    assert list(runs) == [form.name for form in FORMS]
    exact, rounded, paged = runs.values()
    assert exact["losses"]["0"] == rounded["losses"]["0"]
    assert 0 < abs(exact["losses"]["2"] - rounded["losses"]["2"]) < 0.01
    # On a CPU the paged one is the same, to the bit.
    assert paged["losses"] == rounded["losses"]
    assert 3.8 < exact["optimizer_bytes"] / rounded["optimizer_bytes"] < 4
    assert {path.name for path in tmp_path.iterdir()} == {"kept.json"}
