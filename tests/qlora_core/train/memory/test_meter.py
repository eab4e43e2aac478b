"""Where a step's memory went, each kind against bytes counted another way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from qlora_core import Dataset, TextEncoder, TrainConfig, train
from qlora_core.train import Event, RunStarted, StepMetrics
from qlora_core.train.memory.meter import base_bytes

# Of `save_tiny_llama`, by its config.
WIDTH, FEED_FORWARD, VOCABULARY, LAYERS = 64, 96, 384, 2


def _linears() -> list[tuple[int, int]]:
    attention = [(WIDTH, WIDTH), (WIDTH // 2, WIDTH), (WIDTH // 2, WIDTH), (WIDTH, WIDTH)]
    return [*attention, (FEED_FORWARD, WIDTH), (FEED_FORWARD, WIDTH), (WIDTH, FEED_FORWARD)]


def _quantized_bytes(elements: int) -> int:
    """Codes, a byte per 64 for the scales, a float per 256 of these and one for their mean."""
    blocks = -(-elements // 64)
    return elements // 2 + blocks + 4 * -(-blocks // 256) + 4


@pytest.fixture
def steps(
    load: Callable[[], PreTrainedModel],
    encoder: TextEncoder,
    config: Callable[..., TrainConfig],
    make_dataset: Callable[..., Dataset],
    tmp_path: Path,
) -> tuple[list[Event], Path]:
    events: list[Event] = []
    train(load(), encoder, make_dataset(8), config(), events.append, output_dir=tmp_path)
    return events, tmp_path / "adapter"


def test_each_kind_is_the_bytes_of_its_tensors(steps: tuple[list[Event], Path]) -> None:
    events, folder = steps
    memory = [event.memory for event in events if isinstance(event, StepMetrics)][-1]

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - no mapping
    adapter = sum(4 * rows * columns for rows, columns in shapes)
    linears = LAYERS * sum(_quantized_bytes(rows * columns) for rows, columns in _linears())
    dense = 4 * (2 * VOCABULARY * WIDTH + (2 * LAYERS + 1) * WIDTH)
    frequencies = 2 * 4 * (WIDTH // 4 // 2)  # the rotary embedding's two buffers
    assert memory["base_bytes"] == linears + dense + frequencies
    assert memory["adapter_bytes"] == memory["gradients_bytes"] == adapter
    assert memory["optimizer_bytes"] == 2 * adapter + 4 * len(shapes)  # and a step's number each
    assert memory["optimizer_resident_bytes"] == memory["optimizer_bytes"]
    assert memory["workspace_bytes"] == 4 * FEED_FORWARD * WIDTH
    assert 0 < sum(memory[f"{kind}_bytes"] for kind in ("base", "adapter", "optimizer")) < memory["rss_bytes"]  # fmt: skip
    assert memory["rss_bytes"] <= memory["peak_rss_bytes"]
    assert all(isinstance(value, int) for value in memory.values())


def test_the_start_tells_the_bases_bytes(steps: tuple[list[Event], Path]) -> None:
    events, _ = steps

    started = next(event for event in events if isinstance(event, RunStarted))
    step = next(event for event in events if isinstance(event, StepMetrics))
    assert started.base_bytes == step.memory["base_bytes"]


def test_shared_and_trained_tensors_are_not_counted_twice() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 5, bias=False), torch.nn.Linear(3, 5))
    model[1].weight = model[0].weight
    model.requires_grad_(False)
    model[1].bias.requires_grad_(True)

    assert base_bytes(model) == 4 * 15


@pytest.mark.gpu
def test_on_a_gpu_the_kinds_add_up_to_the_steps_peak(
    base: Path,
    encoder: TextEncoder,
    config: Callable[..., TrainConfig],
    make_dataset: Callable[..., Dataset],
    tmp_path: Path,
) -> None:
    from qlora_core import load_model

    model = load_model(base, device="cuda", compute_dtype=torch.bfloat16)
    events: list[Event] = []

    train(model, encoder, make_dataset(8), config(), events.append, output_dir=tmp_path)

    kinds = ("base", "adapter", "optimizer_resident", "gradients", "workspace", "activations")
    for memory in (event.memory for event in events if isinstance(event, StepMetrics)):
        total = sum(memory[f"{kind}_bytes"] for kind in kinds)
        assert memory["activations_bytes"] > 0
        assert total <= memory["peak_bytes"] <= memory["reserved_bytes"]
