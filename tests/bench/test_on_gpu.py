"""The GPU bench runs everywhere, so that the session that has a GPU does not find a broken script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_every_part_runs_through_the_interpreter_and_keeps_nothing() -> None:
    kept = set((ROOT / "bench" / "results").glob("*"))

    result = _bench("--device", "cpu")

    assert result.returncode == 0, result.stderr
    for part in ("kernels", "dequantize", "finetune"):
        assert f"\n{part} (" in result.stdout
    assert "wrong_values=0" in result.stdout
    assert set((ROOT / "bench" / "results").glob("*")) == kept


def test_without_a_gpu_it_says_so(device: str) -> None:
    if device != "cpu":
        pytest.skip("there is a GPU")

    result = _bench()

    assert result.returncode == 0
    assert "There is no NVIDIA GPU" in result.stdout
