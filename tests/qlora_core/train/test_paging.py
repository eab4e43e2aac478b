"""A run whose optimizer is paged: the same run, with its moments on the device from the last backward to the step.

On a CPU the paged names are plain memory, so pinned memory stands in its place here: it does there all that it
does on a GPU, but for streams.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from qlora_core import Dataset, TextEncoder, TrainConfig, load_model, train
from qlora_core.nn import LoraConfig
from qlora_core.optim import optimizer as optimizers
from qlora_core.optim.pinned_memory import PinnedMemory
from qlora_core.optim.state_memory import Bits
from qlora_core.train import Event, Notice, StepMetrics

NAMES = ("adamw", "adamw_8bit")


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[PinnedMemory]:
    """Has paged moments in pinned memory, in pieces of one tile; gives what was opened so far."""
    opened: list[PinnedMemory] = []

    def open_pinned(n: int, bits: Bits, device: torch.device) -> PinnedMemory:
        opened.append(PinnedMemory(n, bits, device, notice="It is pinned.", piece_bytes=1))
        return opened[-1]

    monkeypatch.setattr(optimizers, "open_paged_memory", open_pinned)
    return opened


@pytest.fixture
def run(
    load: Callable[[], PreTrainedModel],
    encoder: TextEncoder,
    config: Callable[..., TrainConfig],
    make_dataset: Callable[..., Dataset],
) -> Callable[..., list[Event]]:
    data = make_dataset(9)

    def train_into(
        folder: Path,
        optimizer: str,
        *,
        model: PreTrainedModel | None = None,
        stop_after: int | None = None,
        **options: Any,
    ) -> list[Event]:
        events: list[Event] = []
        settings = config(
            lora=LoraConfig(r=4, dropout=0.2),
            micro_batch_tokens=64,
            weight_decay=0.1,
            optimizer=optimizer,
        )

        def should_stop() -> bool:
            return stop_after == sum(isinstance(event, StepMetrics) for event in events)

        train(
            model or load(),
            encoder,
            data,
            settings,
            events.append,
            output_dir=folder,
            should_stop=should_stop,
            **options,
        )
        return events

    return train_into


def steps(events: list[Event]) -> list[StepMetrics]:
    return [event for event in events if isinstance(event, StepMetrics)]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    expected, actual = adapter(one), adapter(other)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[key], actual[key]) for key in expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_paged_run_is_the_same_to_the_bit_and_no_moment_is_there_in_the_forward(
    name: str, run: Callable[..., list[Event]], pinned: list[PinnedMemory], tmp_path: Path
) -> None:
    plain = run(tmp_path / "plain", name)

    paged = run(tmp_path / "paged", f"paged_{name}")

    assert len(pinned) == 1
    assert_same(tmp_path / "plain", tmp_path / "paged")
    assert [s.train_loss for s in steps(plain)] == [s.train_loss for s in steps(paged)]
    assert all(step.memory["optimizer_resident_bytes"] == 0 for step in steps(paged))
    kept = [step.memory["optimizer_bytes"] for step in steps(plain)]
    assert [step.memory["optimizer_bytes"] for step in steps(paged)] == kept
    assert [step.memory["optimizer_resident_bytes"] for step in steps(plain)] == kept
    assert "It is pinned." in [event.message for event in paged if isinstance(event, Notice)]


@pytest.mark.parametrize("name", NAMES)
def test_a_paged_run_that_was_stopped_goes_on_to_the_bit(
    name: str, run: Callable[..., list[Event]], pinned: list[PinnedMemory], tmp_path: Path
) -> None:
    run(tmp_path / "whole", f"paged_{name}")
    run(tmp_path / "broken", f"paged_{name}", stop_after=2)

    run(tmp_path / "broken", f"paged_{name}", resume_from=tmp_path / "broken" / "resume")

    assert len(pinned) == 3
    assert_same(tmp_path / "whole", tmp_path / "broken")


def test_moments_come_while_the_trials_and_a_steps_last_backward_run(
    load: Callable[[], PreTrainedModel],
    run: Callable[..., list[Event]],
    pinned: list[PinnedMemory],
    tmp_path: Path,
) -> None:
    model = load()
    forwards: list[int] = []
    backwards: list[int] = []
    layer = model.model.layers[-1]
    layer.register_forward_hook(lambda *_: forwards.append(pinned[0].resident_bytes))
    layer.register_full_backward_hook(lambda *_: backwards.append(pinned[0].resident_bytes))

    taken = len(steps(run(tmp_path, "paged_adamw_8bit", model=model)))

    brought = [resident > 0 for resident in backwards]
    assert not any(forwards)
    assert sum(brought) == taken + 1
    assert len(brought) > 2 * taken  # each step has several micro-batches
    assert brought[0]
    assert brought[-1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_a_paged_run_is_the_same_to_the_bit_with_its_moments_elsewhere(
    name: str, base: Path, run: Callable[..., list[Event]], tmp_path: Path
) -> None:
    def model() -> PreTrainedModel:
        return load_model(base, device="cuda", compute_dtype=torch.bfloat16)

    run(tmp_path / "plain", name, model=model())

    paged = run(tmp_path / "paged", f"paged_{name}", model=model())

    assert_same(tmp_path / "plain", tmp_path / "paged")
    assert all(step.memory["optimizer_resident_bytes"] == 0 for step in steps(paged))
    assert all(step.memory["optimizer_bytes"] > 0 for step in steps(paged))
