"""A resumed run equals an unbroken one bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_core import Dataset, TrainConfig
from qlora_core.nn import LoraConfig
from qlora_core.train import (
    Event,
    ResumeNotExact,
    ResumePointSaved,
    RunFinished,
    RunStarted,
    SamplesGenerated,
    StepMetrics,
    TrainResult,
    ValidationMetrics,
)
from tests.qlora_core.train.resume.changed_points import change_state, state_of

# 12 examples in batches of 4: epochs end after steps 3 and 6.
TOTAL_STEPS = 6


Run = Callable[..., tuple[TrainResult, list[Event]]]


def _figures(events: list[Event]) -> list[Event]:
    """What must be equal in both runs: everything measured but time and memory."""
    return [
        replace(event, tokens_per_s=0, step_time_s=0, memory={}) if isinstance(event, StepMetrics) else event
        for event in events
        if isinstance(event, StepMetrics | ValidationMetrics | RunFinished)
    ]  # fmt: skip


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 5])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(
    stop_after: int, run: Run, tmp_path: Path
) -> None:
    unbroken, whole = run(tmp_path / "whole")
    stopped, before = run(tmp_path / "broken", stop_after=stop_after)
    torch.manual_seed(123)  # the process that resumes has random states of its own

    resumed, after = run(tmp_path / "broken", resume_from=tmp_path / "broken/resume")

    assert stopped.stopped
    assert stopped.adapter is None
    assert isinstance(before[-1], ResumePointSaved)
    started = after[0]
    assert isinstance(started, RunStarted)
    assert (started.start_step, started.total_steps) == (stop_after, TOTAL_STEPS)
    assert _figures(before) + _figures(after) == _figures(whole)
    assert replace(resumed, adapter=None) == replace(unbroken, adapter=None)
    name = "adapter/adapter_model.safetensors"
    expected, actual = load_file(tmp_path / "whole" / name), load_file(tmp_path / "broken" / name)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[key], actual[key]) for key in expected)


@pytest.mark.parametrize("stop_after", [1, 5])
def test_a_resumed_run_with_moments_in_8_bits_equals_an_unbroken_one_bit_for_bit(
    stop_after: int, run: Run, config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    settings = config(lora=LoraConfig(r=4, dropout=0.2), weight_decay=0.1, optimizer="adamw_8bit")
    unbroken, whole = run(tmp_path / "whole", settings=settings)
    _, before = run(tmp_path / "broken", stop_after=stop_after, settings=settings)
    torch.manual_seed(123)

    resumed, after = run(
        tmp_path / "broken", resume_from=tmp_path / "broken/resume", settings=settings
    )

    assert _figures(before) + _figures(after) == _figures(whole)
    assert replace(resumed, adapter=None) == replace(unbroken, adapter=None)
    name = "adapter/adapter_model.safetensors"
    expected, actual = load_file(tmp_path / "whole" / name), load_file(tmp_path / "broken" / name)
    assert all(torch.equal(expected[key], actual[key]) for key in expected)


def test_a_run_that_is_stopped_again_and_again_still_ends_the_same(
    run: Run, tmp_path: Path
) -> None:
    unbroken, _ = run(tmp_path / "whole")

    results = [
        run(tmp_path / "broken", stop_after=stop_after, resume_from=tmp_path / "broken/resume")[0]
        for stop_after in (0, 1, 1, 2, None)
    ]

    assert [result.stopped for result in results] == [True, True, True, True, False]
    assert replace(results[-1], adapter=None) == replace(unbroken, adapter=None)


STOPS: dict[str, Callable[[TrainResult], int]] = {
    "at the first step": lambda _: 1,
    "before the best": lambda whole: whole.adapter_step - 1,
    "at the best": lambda whole: whole.adapter_step,
    "after the best": lambda whole: whole.adapter_step + 1,
    "before the last": lambda whole: whole.steps - 1,
}


@pytest.mark.parametrize("stop", STOPS)
def test_best_adapter_and_patience_survive_a_stop(
    stop: str, run: Run, config: Callable[..., TrainConfig], opposing: Dataset, tmp_path: Path
) -> None:
    # At this rate the validation loss jumps up and down.
    settings = config(
        n_epochs=5, learning_rate=0.1, lr_scheduler_type="constant", warmup_steps=0, eval_steps=1,
        early_stopping_patience=3,
    )  # fmt: skip
    unbroken, whole = run(tmp_path / "whole", settings=settings, validation=opposing)
    _, before = run(
        tmp_path / "broken", stop_after=STOPS[stop](unbroken), settings=settings,
        validation=opposing,
    )  # fmt: skip

    # In a folder of its own, as another worker would: all it knows is in the resume point.
    resumed, after = run(
        tmp_path / "again", settings=settings, validation=opposing,
        resume_from=tmp_path / "broken/resume",
    )  # fmt: skip

    assert unbroken.stopped_early
    assert 1 < unbroken.adapter_step == unbroken.steps - 3
    assert _figures(before) + _figures(after) == _figures(whole)
    assert replace(resumed, adapter=None) == replace(unbroken, adapter=None)
    name = "adapter/adapter_model.safetensors"
    expected, actual = load_file(tmp_path / "whole" / name), load_file(tmp_path / "again" / name)
    assert all(torch.equal(expected[key], actual[key]) for key in expected)


def test_a_run_that_stopped_early_is_not_taken_up_again(
    run: Run, config: Callable[..., TrainConfig], opposing: Dataset, tmp_path: Path
) -> None:
    settings = config(
        n_epochs=5, learning_rate=0.1, lr_scheduler_type="constant", warmup_steps=0, eval_steps=1,
        early_stopping_patience=2,
    )  # fmt: skip
    first, _ = run(tmp_path, settings=settings, validation=opposing)

    again, events = run(
        tmp_path, settings=settings, validation=opposing, resume_from=tmp_path / "resume"
    )

    assert first.stopped_early
    assert again == first
    assert not any(isinstance(event, StepMetrics) for event in events)


def test_going_on_after_the_last_step_only_writes_what_is_missing(run: Run, tmp_path: Path) -> None:
    first, _ = run(tmp_path)

    again, events = run(tmp_path, resume_from=tmp_path / "resume")

    assert [type(event) for event in events] == [RunStarted, RunFinished]
    assert again == first


def test_the_base_answers_the_samples_only_once(run: Run, tmp_path: Path) -> None:
    prompts = [[{"role": "user", "content": "Question 7?"}]]
    _, before = run(tmp_path, stop_after=1, sample_prompts=prompts)

    _, after = run(tmp_path, resume_from=tmp_path / "resume", sample_prompts=prompts)

    stages = [event.stage for event in before + after if isinstance(event, SamplesGenerated)]
    assert stages == ["base", "adapter"]


def test_the_last_two_points_are_kept(run: Run, tmp_path: Path) -> None:
    run(tmp_path, stop_after=5)

    names = sorted(path.name for path in (tmp_path / "resume").iterdir())

    assert names == ["step-3", "step-5"]


def test_a_killed_run_goes_on_within_its_epoch_where_points_are_written_by_time(
    run: Run, config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    settings = config(resume_point_every_s=0.0)
    unbroken, whole = run(tmp_path / "whole", settings=config())
    told: list[Event] = []

    def killed(event: Event) -> None:
        told.append(event)
        if isinstance(event, ResumePointSaved) and event.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", settings=settings, sink=killed)
    resumed, after = run(
        tmp_path / "broken", settings=settings, resume_from=tmp_path / "broken/resume"
    )

    points = [event.step for event in told if isinstance(event, ResumePointSaved)]
    assert points == [1, 2, 3, 4]
    assert isinstance(after[0], RunStarted)
    assert after[0].start_step == 4
    assert _figures(told) + _figures(after) == _figures(whole)
    assert replace(resumed, adapter=None) == replace(unbroken, adapter=None)


def test_memory_settings_may_differ_and_are_told(
    run: Run, config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    run(tmp_path, stop_after=1, settings=config())

    result, events = run(
        tmp_path,
        settings=config(micro_batch_tokens=64, gradient_checkpointing=True),
        resume_from=tmp_path / "resume",
    )

    assert result.steps == TOTAL_STEPS
    assert isinstance(events[0], ResumeNotExact)
    assert events[0].reasons == [
        "micro_batch_tokens is 64, and was 4,096.",
        "gradient_checkpointing is on, and was off.",
    ]


def test_a_resumed_run_computes_as_the_one_before_it_did(run: Run, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    run(tmp_path, stop_after=1)
    state = state_of(tmp_path / "resume/step-1")
    change_state(
        tmp_path / "resume/step-1",
        plan=state["plan"] | {"threads": threads + 1, "recompute": True, "micro_batch_tokens": 40},
    )

    run(tmp_path, stop_after=1, resume_from=tmp_path / "resume")

    plan = state_of(tmp_path / "resume/step-2")["plan"]
    assert (plan["threads"], plan["recompute"]) == (threads + 1, True)
    assert plan["micro_batch_tokens"] == 40
    assert torch.get_num_threads() == threads


def test_a_resume_with_everything_as_it_was_is_exact(run: Run, tmp_path: Path) -> None:
    run(tmp_path, stop_after=2)

    _, events = run(tmp_path, resume_from=tmp_path / "resume")

    assert isinstance(events[0], RunStarted)


def test_the_state_is_readable_by_people(run: Run, tmp_path: Path) -> None:
    run(tmp_path, stop_after=4)

    state = json.loads((tmp_path / "resume/step-4/state.json").read_text(encoding="utf-8"))

    assert (state["progress"]["step"], state["progress"]["epoch"], state["progress"]["window"]) == (
        4,
        1,
        1,
    )
    assert state["identity"]["n_examples"] == 12
    assert state["versions"]["torch"] == torch.__version__
