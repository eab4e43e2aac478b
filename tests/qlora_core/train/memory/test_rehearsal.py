"""The largest micro-batch is tried before the first step, and leaves no trace in what follows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from qlora_core import Dataset, TextEncoder, TrainConfig, train
from qlora_core.errors import OutOfMemoryError
from qlora_core.nn import LoraConfig
from qlora_core.train import Event, Notice
from qlora_core.train.memory.rehearsal import rehearse
from qlora_core.train.run import Run


@pytest.fixture
def prepared(make_run: Callable[..., Run]) -> Run:
    return make_run(9, lora=LoraConfig(r=4, dropout=0.3), gradient_checkpointing=True)


def test_it_changes_neither_weights_nor_moments_nor_random_states(prepared: Run) -> None:
    before = [parameter.detach().clone() for parameter in prepared.parameters]
    state = torch.random.get_rng_state()

    rehearse(prepared)

    assert all(map(torch.equal, before, prepared.parameters))
    assert not any(p.grad is not None and p.grad.any() for p in prepared.parameters)
    kept = prepared.optimizer.state.values()
    assert not any(value.any() for moments in kept for value in moments.values())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert prepared.model.training


def test_what_does_not_fit_is_told_before_the_first_step(
    load: Callable[[], PreTrainedModel],
    encoder: TextEncoder,
    config: Callable[..., TrainConfig],
    make_dataset: Callable[..., Dataset],
    tmp_path: Path,
) -> None:
    dataset = make_dataset(12)
    longest = max(dataset.lengths)
    model, events = load(), list[Event]()

    def exhausted(module: Any, inputs: Any) -> None:
        if module.training and inputs[0].shape[1] == longest:
            torch.empty(2**62, dtype=torch.uint8)

    model.get_submodule("model.norm").register_forward_pre_hook(exhausted)

    with pytest.raises(OutOfMemoryError) as raised:
        train(
            model, encoder, dataset, config(micro_batch_tokens=longest), events.append,
            output_dir=tmp_path,
        )  # fmt: skip

    line = dataset.lines[list(dataset.lengths).index(longest)]
    trial = "in a trial of the largest micro-batch"
    assert (
        f"{trial}, in a pass of one example (line {line}) and {longest} tokens"
        in raised.value.message
    )
    assert [event.kind for event in events] == ["out_of_memory_recovered"]


def test_a_model_without_deterministic_algorithms_is_trained_and_told(
    load: Callable[[], PreTrainedModel],
    encoder: TextEncoder,
    config: Callable[..., TrainConfig],
    make_dataset: Callable[..., Dataset],
    tmp_path: Path,
) -> None:
    model, events = load(), list[Event]()
    seen: list[bool] = []

    def put(_: Any, inputs: Any) -> None:
        """Use an operation that torch has no deterministic algorithm for, on any device."""
        seen.append(torch.are_deterministic_algorithms_enabled())
        inputs[0].detach().clone().put_(torch.tensor([0, 0]), torch.zeros(2), accumulate=False)

    model.get_submodule("model.norm").register_forward_pre_hook(put)

    train(model, encoder, make_dataset(4), config(n_epochs=1), events.append, output_dir=tmp_path)

    (notice,) = [event for event in events if isinstance(event, Notice) and event.level == "warn"]
    assert notice.message.startswith("A run that goes on may differ in its last bits: ")
    assert "deterministic" in notice.message
    assert seen[-1] is False
