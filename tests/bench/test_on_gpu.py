"""The GPU bench runs everywhere, so that the session that has a GPU does not find a broken script."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_core.optim import OPTIMIZERS

ROOT = Path(__file__).resolve().parents[2]


def _bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.on_gpu", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_checks_and_tables_run_through_the_interpreter_and_keep_nothing(tmp_path: Path) -> None:
    parts = ("checks", "dequantize", "quantize")

    result = _bench("--device", "cpu", "--results", str(tmp_path), "--parts", *parts)

    assert result.returncode == 0, result.stdout + result.stderr
    assert "Nothing is wrong" in result.stdout
    counted = re.findall(r"\bwrong_\w+=(\d+)", result.stdout)
    assert len(counted) > 50
    assert set(counted) == {"0"}
    for what in ("tile 4096, 4 warps, gather (launched)", "tile 4096, 4 warps, L1", "bitsandbytes"):
        assert f"what=ours nested, {what}" in result.stdout or f"what={what}" in result.stdout
    shares = [float(share) for share in re.findall(r"share_of_error=([\d.]+)", result.stdout)]
    assert len(shares) == 6  # of what scale="mse" leaves, in three dtypes, plain and nested
    assert all(0.5 < share < 1 for share in shares)
    assert "what=ours nested, searching, public call" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_optimizers_are_checked_and_timed(tmp_path: Path) -> None:
    result = _bench("--device", "cpu", "--results", str(tmp_path), "--parts", "optimizer")

    assert result.returncode == 0, result.stdout + result.stderr
    assert "Nothing is wrong" in result.stdout
    counted = re.findall(r"\bwrong_\w+=(\d+)", result.stdout)
    assert len(counted) > 50
    assert set(counted) == {"0"}
    assert "what=our kernel, 8 bits  elements=3056" in result.stdout
    assert "what=bitsandbytes AdamW8bit" in result.stdout


@pytest.mark.slow
def test_fine_tuning_runs_on_a_cpu_too_with_every_optimizer(tmp_path: Path) -> None:
    result = _bench("--device", "cpu", "--results", str(tmp_path), "--parts", "finetune", "paging")

    assert result.returncode == 0, result.stdout + result.stderr
    assert "train_loss_last=" in result.stdout
    assert re.findall(r"optimizer=(\w+)  step_s=", result.stdout) == list(OPTIMIZERS)
    # Both moments came and went; unified memory is CUDA's.
    assert "state_bytes=24576  resident_bytes=24576  resident_bytes_after=0" in result.stdout
    assert "state_bytes=24576  skipped=" in result.stdout


def test_without_a_gpu_it_says_so(device: str) -> None:
    if device != "cpu":
        pytest.skip("there is a GPU")

    result = _bench()

    assert result.returncode == 0
    assert "There is no NVIDIA GPU" in result.stdout
