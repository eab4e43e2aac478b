"""A tiny base model, small datasets and run files on disk, for the commands that train and what uses their adapters."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny_models import save_tiny_llama

ANSWERS = ["Four bits.", "Half a byte, that is four bits of it.", "No.", "Yes, and more"]

WriteRun = Callable[..., Path]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums come out the same to the bit in this process and in another that has one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("base") / "tiny-llama", initializer_range=0.2)


@pytest.fixture
def write_run(tmp_path: Path, base: Path) -> WriteRun:
    """Write a run's file with its data beside it; give the file."""

    def write(
        *, examples: int = 12, train: str = "", lora: str = "", data: str = "", model: str = ""
    ) -> Path:
        for name, count in (("train", examples), ("valid", 5)):
            lines = [
                {"messages": [{"role": "user", "content": f"Question {i * 7 % 31}?"},
                              {"role": "assistant", "content": ANSWERS[i % len(ANSWERS)]}]}
                for i in range(count)
            ]  # fmt: skip
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
        file = tmp_path / "run.toml"
        file.write_text(
            f"""
output = "out"
[model]
path = "{base}"
device = "cpu"
{model}
[data]
train = "train.jsonl"
{data}
[train]
batch_size = 4
learning_rate = 1e-2
gradient_checkpointing = false
{train}
[lora]
r = 4
alpha = 8
{lora}
""",
            encoding="utf-8",
        )
        return file

    return write
