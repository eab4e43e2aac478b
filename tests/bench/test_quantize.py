"""The CPU bench runs, and its contenders compute the same; how fast they are is nobody's test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import quantize

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_quick_run_finds_the_same_bits_in_both_and_keeps_nothing() -> None:
    kept = set((ROOT / "bench" / "results").glob("*"))

    result = subprocess.run(
        [sys.executable, "-m", "bench.quantize", "--quick", "--rounds", "1", "--shape", "64x128"],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=280,
    )

    assert result.returncode == 0, result.stderr
    assert "64 x 128, bfloat16, 2 threads" in result.stdout
    assert "dequantize into out" in result.stdout
    assert "Both gave the same codes and the same values" in result.stdout
    assert set((ROOT / "bench" / "results").glob("*")) == kept


def run(digest: str) -> dict[str, object]:
    return {"ms": [1.0], "bytes": 1, "peak_bytes": None, "digest": digest}


def test_a_result_that_differs_is_named() -> None:
    same = {
        ("ours", "quantize"): [run("a"), run("a")],
        ("bitsandbytes", "quantize"): [run("a")],
        ("ours", "dequantize"): [run("b")],
        ("bitsandbytes", "kernel"): [run("c")],
        ("both", "copy"): [run("x"), run("y")],
    }

    assert quantize._different(same) == ["dequantize"]


def test_contenders_take_turns_so_that_a_drift_hits_both() -> None:
    turns = "".join(contender[0] for contender in quantize._turns(3))

    assert turns == "boobbo"
