"""A resumed run equals an unbroken one bit for bit, and a torn resume point is never used."""

from __future__ import annotations

import errno
import hashlib
import json
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from qlora_core import Dataset, TextEncoder, TrainConfig, train
from qlora_core.errors import ResumePointError
from qlora_core.nn import LoraConfig, add_lora
from qlora_core.train import (
    Event,
    Notice,
    ResumeNotExact,
    ResumePointSaved,
    RunFinished,
    RunStarted,
    SamplesGenerated,
    StepMetrics,
    TrainResult,
    ValidationMetrics,
)
from qlora_core.train.progress import Progress
from qlora_core.train.resume import save_resume_point

# 12 examples in batches of 4: epochs end after steps 3 and 6.
TOTAL_STEPS = 6


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


TEARS: dict[str, Callable[[Path], object]] = {
    "half a file": lambda p: (p / "optimizer.safetensors").write_bytes((p / "optimizer.safetensors").read_bytes()[:-9]),
    "one bit": lambda p: _flip_a_bit(p / "adapter.safetensors"),
    "state changed": lambda p: (p / "state.json").write_text((p / "state.json").read_text().replace('"epoch": 1', '"epoch": 0')),
    "a file gone": lambda p: (p / "random.safetensors").unlink(),
    "no manifest": lambda p: (p / "manifest.json").unlink(),
    "manifest cut": lambda p: (p / "manifest.json").write_text('{"state.json": '),
    "manifest of another kind": lambda p: (p / "manifest.json").write_text("[]"),
}  # fmt: skip


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_point_is_refused_by_name_and_the_one_before_is_taken(
    tear: str, run: Run, tmp_path: Path
) -> None:
    run(tmp_path, stop_after=4)
    TEARS[tear](tmp_path / "resume/step-4")

    result, events = run(tmp_path, resume_from=tmp_path / "resume")

    assert isinstance(events[0], Notice)
    assert events[0].level == "warn"
    assert events[0].message.startswith("The resume point step-4 is torn")
    assert isinstance(events[1], RunStarted)
    assert events[1].start_step == 3
    assert result.steps == TOTAL_STEPS


def test_without_a_whole_point_the_run_begins_anew_and_says_so(run: Run, tmp_path: Path) -> None:
    run(tmp_path, stop_after=1)
    (tmp_path / "resume/step-1/manifest.json").unlink()

    _, events = run(tmp_path, resume_from=tmp_path / "resume")

    notices = [event.message for event in events if isinstance(event, Notice)]
    assert len(notices) == 2
    assert "starting anew" in notices[1]
    started = next(event for event in events if isinstance(event, RunStarted))
    assert started.start_step == 0


def test_a_folder_that_is_half_written_is_not_a_point(run: Run, tmp_path: Path) -> None:
    run(tmp_path, stop_after=3)
    unfinished = tmp_path / "resume/.step-5.0123abcd.unfinished"
    unfinished.mkdir()
    (unfinished / "state.json").write_text("{")

    _, events = run(tmp_path, resume_from=tmp_path / "resume")

    assert isinstance(events[0], RunStarted)
    assert events[0].start_step == 3


def test_what_killed_runs_left_goes_with_the_next_point(run: Run, tmp_path: Path) -> None:
    for name in (".step-9.0123abcd.unfinished", ".step-1.0123abcd.replaced"):
        (tmp_path / "resume" / name).mkdir(parents=True)

    run(tmp_path, stop_after=1)

    assert [path.name for path in (tmp_path / "resume").iterdir()] == ["step-1"]


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"seed": 7}, "seed is 0 there, 7 here."),
        ({"lora": LoraConfig(r=2)}, "lora.alpha is 8 there, 32 here; lora.r is 4 there, 2 here."),
        (
            {"learning_rate": 1e-3, "lr_scheduler_type": "cosine"},
            "learning_rate is 0.01 there, 0.001 here; lr_scheduler_type is 'linear' there, 'cosine' here.",
        ),
        ({"optimizer": "adamw_8bit"}, "optimizer is 'adamw' there, 'adamw_8bit' here."),
    ],
    ids=str,
)
def test_a_point_of_another_run_is_refused_with_all_that_differs(
    changed: dict[str, Any],
    difference: str,
    run: Run,
    config: Callable[..., TrainConfig],
    tmp_path: Path,
) -> None:
    run(tmp_path, stop_after=1, settings=config())

    with pytest.raises(ResumePointError) as told:
        run(tmp_path, settings=config(**changed), resume_from=tmp_path / "resume")

    assert told.value.message == (f"The resume point step-1 belongs to another run: {difference}")


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
    state = _state_of(tmp_path / "resume/step-1")
    change_state(
        tmp_path / "resume/step-1",
        plan=state["plan"] | {"threads": threads + 1, "recompute": True, "micro_batch_tokens": 40},
    )

    run(tmp_path, stop_after=1, resume_from=tmp_path / "resume")

    plan = _state_of(tmp_path / "resume/step-2")["plan"]
    assert (plan["threads"], plan["recompute"]) == (threads + 1, True)
    assert plan["micro_batch_tokens"] == 40
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (None, "The resume point does not say by which plan its steps were computed."),
        (
            {"threads": 1},
            "The plan of its steps cannot be followed: the plan is of another version of the engine: alone_above, ",
        ),
    ],
    ids=["none", "another version"],
)
def test_a_point_with_a_plan_that_cannot_be_followed_is_taken_all_the_same(
    plan: dict[str, Any] | None, reason: str, run: Run, tmp_path: Path
) -> None:
    run(tmp_path, stop_after=1)
    change_state(tmp_path / "resume/step-1", plan=plan)

    result, events = run(tmp_path, resume_from=tmp_path / "resume")

    assert isinstance(events[0], ResumeNotExact)
    assert len(events[0].reasons) == 1
    assert events[0].reasons[0].startswith(reason)
    assert result.steps == TOTAL_STEPS


def _state_of(point: Path) -> dict[str, Any]:
    return json.loads((point / "state.json").read_text(encoding="utf-8"))


def change_state(point: Path, **changes: Any) -> None:
    """Write a point's state anew, with a sum that fits."""
    state = point / "state.json"
    state.write_text(json.dumps(_state_of(point) | changes), encoding="utf-8")
    manifest = point / "manifest.json"
    sums = json.loads(manifest.read_text())
    sums["state.json"] = hashlib.sha256(state.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(sums))


def save_point(model: PreTrainedModel, folder: Path, step: int) -> Path:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return save_resume_point(
        folder, model=model, optimizer=torch.optim.AdamW(parameters),
        progress=Progress(step=step), best={}, identity={},
    )  # fmt: skip


def test_where_there_is_no_room_the_point_is_named_and_nothing_is_left(
    load: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    model = load()
    add_lora(model, LoraConfig(r=4))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as told:
            save_point(model, tmp_path / "resume", 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert (told.value.errno, told.value.filename) == (errno.EFBIG, str(tmp_path / "resume/step-3"))
    assert list((tmp_path / "resume").iterdir()) == []


def test_a_new_point_stays_beside_those_of_later_steps(
    load: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    model = load()
    add_lora(model, LoraConfig(r=4))

    points = [save_point(model, tmp_path, step) for step in (400, 500, 3)]

    assert [point.is_dir() for point in points] == [True, True, True]


def test_a_run_that_begins_anew_beside_torn_points_can_be_taken_up_again(
    run: Run, tmp_path: Path
) -> None:
    run(tmp_path, stop_after=4)
    for name in ("step-3", "step-4"):
        (tmp_path / "resume" / name / "manifest.json").unlink()

    run(tmp_path, stop_after=1, resume_from=tmp_path / "resume")
    _, events = run(tmp_path, resume_from=tmp_path / "resume")

    assert isinstance(events[0], RunStarted)
    assert events[0].start_step == 1
    assert (tmp_path / "resume/step-4.torn/state.json").is_file()


def test_of_torn_points_the_newest_is_kept(run: Run, tmp_path: Path) -> None:
    for name in ("step-1.torn", "step-20.torn", "step-3.torn"):
        (tmp_path / "resume" / name).mkdir(parents=True)

    run(tmp_path, stop_after=1)

    assert sorted(path.name for path in (tmp_path / "resume").iterdir()) == [
        "step-1",
        "step-20.torn",
    ]


def test_a_point_that_was_being_replaced_when_the_machine_stopped_is_taken(
    run: Run, tmp_path: Path
) -> None:
    run(tmp_path, stop_after=2)
    (tmp_path / "resume/step-2").rename(tmp_path / "resume/.step-2.0123abcd.replaced")

    _, events = run(tmp_path, resume_from=tmp_path / "resume")

    assert isinstance(events[0], RunStarted)
    assert events[0].start_step == 2


@pytest.mark.parametrize("library", ["torch", "qlora_core"])
def test_other_libraries_are_told_and_the_run_goes_on(
    library: str, run: Run, tmp_path: Path
) -> None:
    run(tmp_path, stop_after=2)
    versions = _state_of(tmp_path / "resume/step-2")["versions"]
    now = versions[library]
    change_state(tmp_path / "resume/step-2", versions=versions | {library: "0.7"})

    result, events = run(tmp_path, resume_from=tmp_path / "resume")

    assert events[0] == ResumeNotExact(2, [f"{library} was 0.7, and is {now} now."])
    assert isinstance(events[1], RunStarted)
    assert events[1].start_step == 2
    assert result.steps == TOTAL_STEPS


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
