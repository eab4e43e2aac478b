"""A limit that system or driver hold, in a process of its own: there torch's allocators and Python's mmap really fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import save_tiny_llama

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is Linux's")
_WIDE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return save_tiny_llama(folder, max_position_embeddings=2048, **_WIDE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight texts that are cut to whatever the context is."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    texts = [" ".join(f"{number}{word}" for word in range(800)) for number in range(8)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def _trained(
    model: Path, data: Path, out: Path, *, context: int, mib: int, device: str = "cpu"
) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.qlora_core.train.memory.in_little_memory"]
    done = subprocess.run(
        [*command, str(model), str(data), str(out), str(context), str(mib), device],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def _of_kind(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["kind"] == kind]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_run_that_memory_is_refused_to_ends_with_the_same_loss(
    device: str, model: Path, data: Path, tmp_path: Path
) -> None:
    free = _trained(model, data, tmp_path / "free", context=512, mib=0, device=device)

    limited = _trained(model, data, tmp_path / "limited", context=512, mib=150, device=device)

    changes = [event["change"] for event in _of_kind(limited, "out_of_memory_recovered")]
    assert changes[0] == "recompute"
    assert "out_of_memory_recovered" not in {event["kind"] for event in free}
    (expected,), (actual,) = (_of_kind(events, "run_finished") for events in (free, limited))
    assert actual["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)


def test_a_run_that_does_not_fit_in_any_form_says_what_would(
    model: Path, data: Path, tmp_path: Path
) -> None:
    events = _trained(model, data, tmp_path / "out", context=2048, mib=60)

    (error,) = _of_kind(events, "error")
    assert error["code"] == "out_of_memory"
    assert "in a pass of one example" in error["message"]
    assert "By the estimate this takes" in error["message"]
    assert "By the estimate it fits into" in error["message"]
    assert "context_length = " in error["message"]
