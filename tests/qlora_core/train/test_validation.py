"""When the validation set is measured, when its loss ends a run, and which adapter is then offered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import PreTrainedModel

from qlora_core import Dataset, TextEncoder, TrainConfig, load_adapter, train
from qlora_core.errors import ConfigError
from qlora_core.train import (
    CheckpointSaved,
    Event,
    Notice,
    ResumePointSaved,
    RunFinished,
    SamplesGenerated,
    StepMetrics,
    TrainResult,
    ValidationMetrics,
)

Train = Callable[..., tuple[TrainResult, list[Event]]]

# 12 examples in batches of 4: epochs of three steps. At this rate the validation loss jumps up and down.
JUMPY: dict[str, Any] = {"n_epochs": 5, "learning_rate": 0.1, "lr_scheduler_type": "constant", "warmup_steps": 0}  # fmt: skip
STEPS = 15


@pytest.fixture
def run(
    load: Callable[[], PreTrainedModel],
    encoder: TextEncoder,
    config: Callable[..., TrainConfig],
    make_dataset: Callable[..., Dataset],
    opposing: Dataset,
) -> Train:
    """Train on 12 examples in a folder, on a model of its own."""

    def go(folder: Path, **settings: Any) -> tuple[TrainResult, list[Event]]:
        options = {name: settings.pop(name) for name in ("sample_prompts",) if name in settings}
        events: list[Event] = []
        result = train(
            load(), encoder, make_dataset(12), config(**{**JUMPY, **settings}), events.append,
            output_dir=folder, validation=opposing, **options,
        )  # fmt: skip
        return result, events

    return go


def _validations(events: Sequence[Event]) -> list[ValidationMetrics]:
    return [event for event in events if isinstance(event, ValidationMetrics)]


def _finished(events: Sequence[Event]) -> RunFinished:
    event = events[-1]
    assert isinstance(event, RunFinished)
    return event


def _same_adapter(one: Path, other: Path) -> bool:
    left, right = (load_file(p / "adapter_model.safetensors") for p in (one, other))
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 3, 6, 9, 12, 15]),
        ({"eval_steps": 2}, [0, 2, 3, 4, 6, 8, 9, 10, 12, 14, 15]),
        ({"eval_steps": 100}, [0, 3, 6, 9, 12, 15]),
        ({"eval_steps": 4, "max_steps": 7}, [0, 3, 4, 6, 7]),
        ({"max_steps": 2}, [0, 2]),
    ],
    ids=str,
)
def test_it_is_measured_at_intervals_at_each_epochs_end_and_at_the_end(
    settings: dict[str, Any], expected: list[int], run: Train, tmp_path: Path
) -> None:
    _, events = run(tmp_path, learning_rate=1e-3, **settings)

    assert [event.step for event in _validations(events)] == expected


def test_a_validation_within_an_epoch_moves_nothing(run: Train, tmp_path: Path) -> None:
    run(tmp_path / "often", eval_steps=1)

    run(tmp_path / "seldom")

    assert _same_adapter(tmp_path / "often/adapter", tmp_path / "seldom/adapter")


def _expected_stop(losses: Sequence[float], patience: int) -> tuple[int, int]:
    """After which step the run should end, and which was best, from the losses after steps 1, 2, …"""
    for step in range(1, len(losses) + 1):
        best = min(range(step), key=lambda i: losses[i]) + 1
        if step - best >= patience:
            return step, best
    return len(losses), min(range(len(losses)), key=lambda i: losses[i]) + 1


@pytest.mark.parametrize("patience", [1, 2, 3, 7, 9])
def test_the_run_stops_exactly_when_patience_ends_and_offers_the_best(
    patience: int, run: Train, load: Callable[[], PreTrainedModel], opposing: Dataset, tmp_path: Path
) -> None:  # fmt: skip
    _, unstopped = run(tmp_path / "whole", eval_steps=1)
    losses = [event.full_valid_loss for event in _validations(unstopped)[1:]]
    stop, best = _expected_stop(losses, patience)

    result, events = run(tmp_path / "stopped", eval_steps=1, early_stopping_patience=patience)
    run(tmp_path / "to the best", max_steps=best)

    assert (result.steps, result.adapter_step) == (stop, best)
    assert result.stopped_early is (stop < STEPS)
    assert [event.full_valid_loss for event in _validations(events)[1:]] == losses[:stop]
    assert result.valid_loss == losses[best - 1] == min(losses[:stop])
    finished = _finished(events)
    assert (finished.adapter_step, finished.best_step) == (best, best)
    assert finished.full_valid_loss == finished.best_valid_loss == losses[best - 1]
    assert _same_adapter(tmp_path / "stopped/adapter", tmp_path / "to the best/adapter")
    model = load()
    load_adapter(model, tmp_path / "stopped/adapter")
    assert _loss_of_transformers(model, opposing) == pytest.approx(losses[best - 1], rel=1e-5)


@torch.no_grad()
def _loss_of_transformers(model: PreTrainedModel, dataset: Dataset) -> float:
    total, n_tokens = 0.0, 0
    for index in range(len(dataset)):
        ids, trained = dataset.example(index)
        logits = model(input_ids=ids.long()[None]).logits[0, :-1]  # pyright: ignore[reportCallIssue]
        targets, mask = ids.long()[1:], trained[1:]
        total += float(functional.cross_entropy(logits[mask], targets[mask], reduction="sum"))
        n_tokens += int(mask.sum())
    return total / n_tokens


def test_the_crafted_run_has_a_best_that_is_neither_first_nor_last(
    run: Train, tmp_path: Path
) -> None:
    _, events = run(tmp_path, eval_steps=1)

    losses = [event.full_valid_loss for event in _validations(events)[1:]]
    stops = {_expected_stop(losses, patience) for patience in (1, 2, 3)}
    assert len(stops) > 1
    assert all(1 < best < stop < STEPS for stop, best in stops)


def test_stopping_early_ends_with_a_checkpoint_a_resume_point_and_a_sentence(
    run: Train, tmp_path: Path
) -> None:
    prompts = [[{"role": "user", "content": "Question 7?"}]]

    result, events = run(tmp_path, eval_steps=1, early_stopping_patience=2, sample_prompts=prompts)

    stop, best = result.steps, result.adapter_step
    last = [type(event) for event in events[-7:]]
    assert last == [StepMetrics, ValidationMetrics, CheckpointSaved, ResumePointSaved, Notice, SamplesGenerated, RunFinished]  # fmt: skip
    notice = next(event for event in events if isinstance(event, Notice))
    best_loss = min(event.full_valid_loss for event in _validations(events)[1:])
    assert notice.level == "info"
    assert notice.message == (
        "Stopped early: the validation loss has not improved in 2 validations. "
        f"The best was {best_loss:.4f} after step {best}."
    )
    checkpoint = next(event for event in reversed(events) if isinstance(event, CheckpointSaved))
    assert checkpoint.step == stop
    assert not _same_adapter(Path(checkpoint.folder), tmp_path / "adapter")
    samples = next(event for event in reversed(events) if isinstance(event, SamplesGenerated))
    assert samples.step == best


def test_the_best_is_marked_and_told_but_the_last_is_offered_unless_asked(
    run: Train, tmp_path: Path
) -> None:
    result, events = run(tmp_path / "last", eval_steps=1)
    asked, _ = run(tmp_path / "best", eval_steps=1, load_best_at_end=True, max_steps=12)
    declined, _ = run(
        tmp_path / "declined", eval_steps=1, early_stopping_patience=3, load_best_at_end=False
    )

    losses = [event.full_valid_loss for event in _validations(events)[1:]]
    marks = [event.is_best for event in _validations(events)]
    assert marks == [False, *(loss < min([*losses[:i], 1e9]) for i, loss in enumerate(losses))]
    assert result.adapter_step == STEPS
    assert result.valid_loss == losses[-1]
    finished = _finished(events)
    assert finished.best_valid_loss == min(losses) == losses[(finished.best_step or 0) - 1]
    assert asked.adapter_step == min(range(12), key=lambda i: losses[i]) + 1 < 12
    assert declined.stopped_early
    assert declined.adapter_step == declined.steps


def test_the_model_itself_ends_as_the_adapter_that_is_offered(
    load: Callable[[], PreTrainedModel],
    encoder: TextEncoder,
    config: Callable[..., TrainConfig],
    make_dataset: Callable[..., Dataset],
    opposing: Dataset,
    tmp_path: Path,
) -> None:
    model, ids = load(), torch.tensor([[5, 9, 200, 7, 44]])
    settings = config(**JUMPY, eval_steps=1, load_best_at_end=True, max_steps=12)

    train(
        model, encoder, make_dataset(12), settings, lambda _: None, output_dir=tmp_path,
        validation=opposing,
    )  # fmt: skip

    again = load()
    load_adapter(again, tmp_path / "adapter")
    logits = model.eval()(input_ids=ids).logits  # pyright: ignore[reportCallIssue]
    assert torch.equal(logits, again(input_ids=ids).logits)  # pyright: ignore[reportCallIssue]


def test_a_loss_that_is_not_finite_counts_as_no_improvement(
    load: Callable[[], PreTrainedModel],
    encoder: TextEncoder,
    config: Callable[..., TrainConfig],
    make_dataset: Callable[..., Dataset],
    tmp_path: Path,
) -> None:
    model, events = load(), list[Event]()

    def spoil(module: Any, _: Any, output: Any) -> Any:
        return output if module.training else output * float("nan")

    model.get_submodule("model.norm").register_forward_hook(spoil)
    settings = config(early_stopping_patience=2, n_epochs=4)

    result = train(
        model, encoder, make_dataset(8), settings, events.append, output_dir=tmp_path,
        validation=make_dataset(3),
    )  # fmt: skip

    assert result.steps == result.adapter_step == 4
    assert result.valid_loss is None
    assert _finished(events).best_step is None
    told = [
        event for event in events if isinstance(event, Notice) and "validation" in event.message
    ]
    assert [notice.level for notice in told] == ["warn", "warn", "warn", "info"]
    assert told[0].message == "The validation loss after step 0 is nan."
    assert told[-1].message.endswith("No validation loss was finite.")


@pytest.mark.parametrize(
    "setting", [{"eval_steps": 5}, {"early_stopping_patience": 1}, {"load_best_at_end": True}]
)
def test_what_needs_a_validation_set_is_refused_without_one(
    setting: dict[str, Any],
    load: Callable[[], PreTrainedModel],
    encoder: TextEncoder,
    config: Callable[..., TrainConfig],
    make_dataset: Callable[..., Dataset],
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(setting))} needs a validation set"):
        train(
            load(), encoder, make_dataset(4), config(**setting), lambda _: None,
            output_dir=tmp_path,
        )  # fmt: skip
