"""Memory that ends makes a run more frugal, not wrong: under a cap that a test sets, the same losses come out."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from qlora_core import Dataset, TextEncoder, TrainConfig, train
from qlora_core.errors import OutOfMemoryError
from qlora_core.nn import LoraConfig
from qlora_core.train import (
    Event,
    OutOfMemoryRecovered,
    ResumeNotExact,
    StepMetrics,
    ValidationMetrics,
)
from qlora_core.train.progress import Progress
from qlora_core.train.run import Run
from qlora_core.train.step import take_step
from tests.qlora_core.train.memory.memory_cap import MemoryCap

ADAPTER = "adapter/adapter_model.safetensors"


class Outcome:
    """What a run under a cap told, and how much it took."""

    def __init__(self, folder: Path, events: list[Event], cap: MemoryCap) -> None:
        self.folder, self.events, self.cap = folder, events, cap

    @property
    def steps(self) -> list[StepMetrics]:
        return [event for event in self.events if isinstance(event, StepMetrics)]

    @property
    def losses(self) -> list[float | None]:
        return [step.train_loss for step in self.steps]

    @property
    def recovered(self) -> list[OutOfMemoryRecovered]:
        return [event for event in self.events if isinstance(event, OutOfMemoryRecovered)]

    @property
    def changes(self) -> list[str]:
        return [event.change for event in self.recovered]

    @property
    def adapter(self) -> dict[str, Tensor]:
        return load_file(self.folder / ADAPTER)


Go = Callable[..., Outcome]


@pytest.fixture
def go(
    load: Callable[[], PreTrainedModel],
    encoder: TextEncoder,
    config: Callable[..., TrainConfig],
    make_dataset: Callable[..., Dataset],
    tmp_path: Path,
) -> Go:
    """Train one epoch of three steps; under a cap from the beginning, or from ``after`` a step on."""
    folders = iter(range(100))

    def run(most_bytes: float = float("inf"), *, after: int = -1, **options: Any) -> Outcome:
        validation = options.pop("validation", None)
        dropout = options.pop("dropout", 0.0)
        lora = LoraConfig(r=4, alpha=8, dropout=dropout)
        folder = options.pop("folder", None) or tmp_path / str(next(folders))
        stop_after = options.pop("stop_after", None)
        resume_from = options.pop("resume_from", None)
        settings = config(**{"n_epochs": 1, "lora": lora, **options})
        events, model = list[Event](), load()
        cap = MemoryCap(model, most_bytes if after < 0 else float("inf"))

        def sink(event: Event) -> None:
            events.append(event)
            if isinstance(event, StepMetrics) and event.step == after:
                cap.most_bytes = most_bytes

        gc.collect()
        with cap:
            train(
                model, encoder, make_dataset(12), settings, sink, output_dir=folder, validation=validation,
                resume_from=resume_from,
                should_stop=lambda: sum(isinstance(e, StepMetrics) for e in events) == stop_after,
            )  # fmt: skip
        return Outcome(folder, events, cap)

    return run


def test_the_first_notch_recomputes_every_layer_and_changes_no_bit(go: Go) -> None:
    free, recomputed = go(), go(gradient_checkpointing=True)

    capped = go((free.cap.peak_bytes + recomputed.cap.peak_bytes) / 2)

    assert capped.changes == ["recompute"]
    assert capped.losses == free.losses
    for name, value in free.adapter.items():
        assert torch.equal(capped.adapter[name], value)


def test_then_passes_are_halved_and_loss_and_gradient_stay_what_they_are(go: Go) -> None:
    free, small = go(), go(gradient_checkpointing=True, micro_batch_tokens=72)

    capped = go(1.1 * small.cap.peak_bytes)

    assert capped.changes == ["recompute", "smaller_passes"]
    first, second = capped.recovered
    assert first.micro_batch_tokens == 4096
    assert second.micro_batch_tokens == 72  # half of the largest pass, of 145 tokens
    assert "in a pass of 4 examples and 145 tokens" in second.where
    assert capped.losses == pytest.approx(free.losses, rel=1e-5)
    norms = [step.grad_norm for step in capped.steps]
    assert norms == pytest.approx([step.grad_norm for step in free.steps], rel=1e-4)
    assert [s.trained_tokens for s in capped.steps] == [s.trained_tokens for s in free.steps]


def test_they_are_halved_until_a_pass_is_one_example(go: Go) -> None:
    free, alone = go(), go(gradient_checkpointing=True, micro_batch_tokens=1)

    capped = go(1.05 * alone.cap.peak_bytes, micro_batch_tokens=100, packing=False)

    assert capped.changes == ["recompute", "smaller_passes", "smaller_passes"]
    assert capped.losses == pytest.approx(free.losses, rel=1e-5)


def test_memory_that_ends_within_a_run_costs_no_step_and_no_bit_of_dropout(go: Go) -> None:
    free = go(dropout=0.3)
    recomputed = go(dropout=0.3, gradient_checkpointing=True)

    capped = go((free.cap.peak_bytes + recomputed.cap.peak_bytes) / 2, after=1, dropout=0.3)

    (event,) = capped.recovered
    assert (event.change, event.step) == ("recompute", 2)
    assert event.where.startswith("in step 2, in a pass of 4 examples")
    assert event.message.startswith("Memory ended in step 2, ")
    assert [step.step for step in capped.steps] == [1, 2, 3]
    assert capped.losses == free.losses
    for name, value in free.adapter.items():
        assert torch.equal(capped.adapter[name], value)


def test_a_notch_is_kept_for_the_steps_that_follow(go: Go) -> None:
    recomputed = go(gradient_checkpointing=True)

    capped = go(1.1 * recomputed.cap.peak_bytes, n_epochs=2)

    assert capped.changes == ["recompute"]
    assert capped.cap.n_refused == 1
    assert len(capped.steps) == 6


@pytest.mark.parametrize("stop_after", [2, 3, 4])
def test_a_run_that_goes_on_keeps_its_notches_and_ends_in_the_same_bits(
    stop_after: int, go: Go, tmp_path: Path
) -> None:
    small = go(gradient_checkpointing=True, micro_batch_tokens=72, dropout=0.3)
    settings = {"n_epochs": 2, "dropout": 0.3}
    most_bytes = 1.1 * small.cap.peak_bytes
    unbroken = go(most_bytes, after=1, **settings)
    before = go(most_bytes, after=1, stop_after=stop_after, folder=tmp_path / "broken", **settings)

    # Its memory would suffice for the plan that it began with.
    after = go(folder=before.folder, resume_from=before.folder / "resume", **settings)

    assert unbroken.changes == before.changes == ["recompute", "smaller_passes"]
    assert after.changes == []
    assert not any(isinstance(event, ResumeNotExact) for event in after.events)
    assert before.losses + after.losses == unbroken.losses
    for name, value in unbroken.adapter.items():
        assert torch.equal(after.adapter[name], value)


def test_what_the_failed_pass_held_is_free_before_the_next(go: Go) -> None:
    alone = go(gradient_checkpointing=True, micro_batch_tokens=1)

    capped = go(1.05 * alone.cap.peak_bytes, after=1)

    # Tensors of the failed passes, were they still there, would not fit beside the next one's.
    assert capped.changes == ["recompute", "smaller_passes", "smaller_passes"]
    assert len(capped.steps) == 3


def test_a_validation_that_does_not_fit_takes_smaller_passes_too(
    go: Go, make_dataset: Callable[..., Dataset]
) -> None:
    validation = make_dataset(40)
    free = go(batch_size=1, validation=validation)
    trained = go(batch_size=1)

    capped = go((free.cap.peak_bytes + trained.cap.peak_bytes) / 2, batch_size=1, validation=validation)  # fmt: skip

    assert set(capped.changes) == {"smaller_passes"}
    assert capped.recovered[0].where.startswith("in the validation after step 0, in a pass of 40")
    losses = [[e.full_valid_loss for e in o.events if isinstance(e, ValidationMetrics)] for o in (capped, free)]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_most_frugal_form_that_does_not_fit_ends_the_run_and_says_what_takes_memory(
    go: Go,
) -> None:
    alone = go(gradient_checkpointing=True, micro_batch_tokens=1)

    with pytest.raises(OutOfMemoryError) as raised:
        go(0.8 * alone.cap.peak_bytes)

    message = raised.value.message
    assert (
        "in a trial of the largest micro-batch, in a pass of one example (line 7) and 38 tokens"
        in message
    )
    assert "every layer recomputed" in message
    assert "By the estimate this takes" in message
    assert str(raised.value.__cause__) == "the test's cap"


@pytest.fixture
def prepared(make_run: Callable[..., Run]) -> Run:
    return make_run(9)


def test_a_step_of_the_optimizer_is_never_repeated(prepared: Run) -> None:
    cap, progress, n_taken = MemoryCap(prepared.model), Progress(), 0

    def end_memory(*_: object) -> None:
        nonlocal n_taken
        n_taken += 1
        cap.most_bytes = 0

    prepared.optimizer.register_step_pre_hook(end_memory)

    with cap, pytest.raises(torch.OutOfMemoryError):
        take_step(prepared, progress)

    assert n_taken == 1
    assert progress == Progress()


def test_another_error_is_not_taken_for_memorys(prepared: Run) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the layer is broken")

    prepared.model.get_submodule("model.norm").register_forward_pre_hook(broken)

    with pytest.raises(RuntimeError, match="the layer is broken"):
        take_step(prepared, Progress())
