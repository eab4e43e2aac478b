"""A tiny base model and a small dataset on disk, shared by the tests of training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from qlora_core import Dataset, TextEncoder, TrainConfig, load_dataset, load_model, train
from qlora_core.nn import LoraConfig
from qlora_core.train import Event, StepMetrics, TrainResult
from qlora_core.train.events import Sink
from qlora_core.train.run import Run, prepare
from tests.tiny_models import save_tiny_llama

ANSWERS = [
    "Four bits.",
    "Half a byte, that is four bits of it.",
    "A byte has eight.",
    "No.",
    "Yes, and more",
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several test processes share the cores; torch's threads would only fight."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Weights this large let a frozen random head say something with certainty.
    return save_tiny_llama(tmp_path_factory.mktemp("base") / "tiny-llama", initializer_range=0.2)


@pytest.fixture(scope="session")
def encoder(base: Path) -> TextEncoder:
    return TextEncoder.from_folder(base)


@pytest.fixture(scope="session")
def make_dataset(
    encoder: TextEncoder, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Dataset]:
    """Write and load ``count`` short chats, all of them ``repeat`` times; the same each time."""

    def make(count: int, *, repeat: int = 1, **options: Any) -> Dataset:
        path = tmp_path_factory.mktemp("data") / "train.jsonl"
        lines = [
            {"messages": [{"role": "user", "content": f"Question {i * 7 % 31}?"},
                          {"role": "assistant", "content": ANSWERS[i % len(ANSWERS)]}]}
            for i in range(count)
        ]  # fmt: skip
        path.write_text(
            "".join(json.dumps(line) + "\n" for line in lines * repeat), encoding="utf-8"
        )
        return load_dataset(path, encoder, **{"context_length": 64, **options})

    return make


@pytest.fixture(scope="session")
def opposing(encoder: TextEncoder, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The same questions with other answers: what is learned by heart makes it worse."""
    path = tmp_path_factory.mktemp("opposing") / "valid.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"Question {i * 7 % 31}?"},
                      {"role": "assistant", "content": ANSWERS[(i + 1) % len(ANSWERS)]}]}
        for i in range(12)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return load_dataset(path, encoder, context_length=64)


@pytest.fixture
def load(base: Path) -> Callable[[], PreTrainedModel]:
    def load_base() -> PreTrainedModel:
        return load_model(base, device="cpu", compute_dtype=torch.float32)

    return load_base


@pytest.fixture
def config() -> Callable[..., TrainConfig]:
    def make(**options: Any) -> TrainConfig:
        settings = {"n_epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "context_length": 64,
                    "gradient_checkpointing": False, "lora": LoraConfig(r=4, alpha=8)}  # fmt: skip
        return TrainConfig(**{**settings, **options})

    return make


@pytest.fixture
def run(
    load: Callable[[], PreTrainedModel],
    encoder: TextEncoder,
    config: Callable[..., TrainConfig],
    make_dataset: Callable[..., Dataset],
) -> Callable[..., tuple[TrainResult, list[Event]]]:
    """Train in a folder, on a model of its own; ``stop_after`` steps if given."""

    def go(
        folder: Path,
        *,
        stop_after: int | None = None,
        settings: TrainConfig | None = None,
        **options: Any,
    ) -> tuple[TrainResult, list[Event]]:
        events: list[Event] = []
        done = lambda: sum(isinstance(e, StepMetrics) for e in events)  # noqa: E731
        if stop_after is not None:
            options["should_stop"] = lambda: done() >= stop_after
        sink = options.pop("sink", events.append)
        result = train(
            load(), encoder, make_dataset(12),
            settings or config(lora=LoraConfig(r=4, dropout=0.2), weight_decay=0.1, lr_scheduler_type="cosine"),
            sink, output_dir=folder, **{"validation": make_dataset(5), **options},
        )  # fmt: skip
        return result, events

    return go


@pytest.fixture
def make_run(
    load: Callable[[], PreTrainedModel],
    encoder: TextEncoder,
    config: Callable[..., TrainConfig],
    make_dataset: Callable[..., Dataset],
    tmp_path: Path,
) -> Callable[..., Run]:
    """Make a run of ``count`` examples ready, on a model of its own unless one is given."""

    def make(
        count: int,
        *,
        model: PreTrainedModel | None = None,
        sink: Sink = lambda _: None,
        **settings: Any,
    ) -> Run:
        return prepare(
            model or load(), encoder, make_dataset(count), config(**settings), sink, output_dir=tmp_path,
            validation=None, sample_prompts=(), base_model=None, adapter=None,
        )  # fmt: skip

    return make
