"""The gate that needs no GPU: every kernel compiles for the GPUs we serve, without spilling."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "compile_kernels.py"
ROOT = Path(__file__).parents[3]
# The smallest limit among the architectures below, sm_120's.
SHARED_LIMIT_BYTES = 99 * 1024


def test_every_kernel_compiles_without_spills_or_fused_multiply_adds(tmp_path: Path) -> None:
    rows = compile_kernels("short", 80, 90, 120, cache=tmp_path)

    assert {row["kernel"].split()[0] for row in rows} == {
        "quantize_nf4",
        "dequantize_nf4",
        "quantize_absmax",
    }
    assert {row["arch"] for row in rows} == {80, 90, 120}
    for row in rows:
        check(row)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_configuration_compiles_for_every_architecture(tmp_path: Path) -> None:
    rows = compile_kernels("all", 80, 86, 89, 90, 120, cache=tmp_path)

    assert len(rows) == 5 * (3 * 3 * 8 + 1)
    for row in rows:
        check(row)


def compile_kernels(which: str, *archs: int, cache: Path) -> list[dict[str, Any]]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, SCRIPT, which, *map(str, archs)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(row: dict[str, Any]) -> None:
    assert row["instructions"] > 50, row
    assert row["local_bytes"] == 0, row
    assert row["stack_accesses"] == 0, row
    assert row["fused_multiply_adds"] == 0, row
    assert row["shared_bytes"] <= SHARED_LIMIT_BYTES, row
    if row["kernel"].startswith("dequantize"):
        assert row["wide_stores"] > 0, row
