"""The table of QLoRA beside LoRA, its picture, and a bench that goes on where it was."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import qlora_vs_lora
from bench.loss_curves import draw
from bench.qlora_vs_lora import FORMS, table
from bench.surroundings import versions

ROOT = Path(__file__).resolve().parents[2]


def _kept() -> dict[str, Any]:
    """Three seeds, whose differences are 0.01, 0.02 and 0.03 in the end."""
    return {
        "model": "tiny", "examples": 8, "epochs": 1,
        "runs": [
            {"base": base, "seed": seed, "losses": {"0": 5.0 + extra, "4": 3.0 + seed / 10 + extra * (seed + 1)}}
            for seed in range(3)
            for base, extra in (("16-bit", 0.0), ("NF4+DQ", 0.01))
        ],
    }  # fmt: skip


def test_the_table_tells_the_mean_of_the_paired_differences_and_its_spread() -> None:
    lines = table(_kept()["runs"]).splitlines()

    assert lines[1].split() == ["0", "3.0000", "3.0100", "+0.0100"]
    assert lines[4].split()[:4] == ["before", "5.0000", "5.0100", "+0.0100"]
    assert lines[5] == "mean difference +0.0200 nats per token, standard deviation 0.0100"
    # 4.303 * 0.01 / sqrt(3) around it.
    assert lines[6] == "95% of the mean: -0.0048 to +0.0448"
    assert lines[7].endswith("between the seeds of 16-bit LoRA: 0.1000")


def test_a_single_seed_has_no_spread() -> None:
    lines = table(_kept()["runs"][:2]).splitlines()

    assert len(lines) == 3


def test_the_same_figures_give_the_same_picture(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        draw(_kept(), tmp_path / name, key="base", forms=FORMS, title="difference")

    content = (tmp_path / "one.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content == (tmp_path / "two.png").read_bytes()


def test_only_a_run_of_the_whole_is_drawn_for_the_docs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, picture = tmp_path / "kept.json", tmp_path / "docs.png"
    settings = {
        "model": "tiny-llama", "examples": 16, "validation": 200, "epochs": 2, "rate": 1e-3, "device": "cpu",
        "versions": versions("torch", "transformers"),
    }  # fmt: skip
    file.write_text(json.dumps(_kept() | settings))
    monkeypatch.setattr(qlora_vs_lora, "PICTURE", picture)
    monkeypatch.setattr(
        sys, "argv", ["bench", "--examples", "16", "--device", "cpu", "--file", str(file)]
    )

    assert qlora_vs_lora.main() == 0

    assert not picture.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]


@pytest.mark.slow
def test_what_is_measured_already_is_not_measured_again(tmp_path: Path) -> None:
    file, picture = tmp_path / "kept.json", tmp_path / "picture.png"
    command = [
        sys.executable, "-m", "bench.qlora_vs_lora", "--examples", "16", "--validation", "4", "--epochs", "1",
        "--file", file, "--picture", picture,
    ]  # fmt: skip

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=250
        )

    first, second = run("--seeds", "0"), run("--seeds", "0", "1")
    other = run("--rate", "0.5")

    assert "seed 0, NF4+DQ" in first.stdout
    assert "seed 0, " not in second.stdout
    assert "seed 1, 16-bit" in second.stdout
    kept = json.loads(file.read_text())
    assert [(one["base"], one["seed"]) for one in kept["runs"]] == [
        ("16-bit", 0), ("NF4+DQ", 0), ("16-bit", 1), ("NF4+DQ", 1),
    ]  # fmt: skip
    assert picture.exists()
    assert (other.returncode, "is of other settings" in other.stderr) == (2, True)
