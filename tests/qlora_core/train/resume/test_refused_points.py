"""Resume points that are torn, of another run, or of another version: which is taken, and what is told."""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import PreTrainedModel

from qlora_core import TrainConfig
from qlora_core.errors import ResumePointError
from qlora_core.nn import LoraConfig, add_lora
from qlora_core.optim.flat_adamw import FlatAdamW
from qlora_core.train import (
    Event,
    Notice,
    ResumeNotExact,
    RunStarted,
    TrainResult,
)
from qlora_core.train.progress import Progress
from qlora_core.train.resume.files import discard_old_points
from qlora_core.train.resume.points import load_resume_point, save_resume_point
from tests.qlora_core.train.resume.changed_points import change_state, state_of

# 12 examples in batches of 4: epochs end after steps 3 and 6.
TOTAL_STEPS = 6


Run = Callable[..., tuple[TrainResult, list[Event]]]


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


def save_point(
    model: PreTrainedModel, folder: Path, step: int, *, bits: Literal[8, 32] = 32
) -> Path:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    point = save_resume_point(
        folder, model=model, optimizer=FlatAdamW(parameters, bits=bits, learning_rate=1e-3),
        progress=Progress(step=step), best={}, identity={},
    )  # fmt: skip
    discard_old_points(folder, step).result()
    return point


def test_moments_of_another_kind_are_refused_with_what_differs(
    load: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    model = load()
    add_lora(model, LoraConfig(r=4))
    save_point(model, tmp_path, 3, bits=8)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.clone() for parameter in parameters]

    with pytest.raises(ResumePointError) as told:
        load_resume_point(
            tmp_path, model=model, optimizer=FlatAdamW(parameters, bits=32, learning_rate=1e-3),
            identity={}, on_refused=lambda *_: None,
        )  # fmt: skip

    assert told.value.message.startswith(
        "The resume point step-3 is of another optimizer: 0.exp_avg is uint8 [4, 64] there, float32 [4, 64] here; "
        "0.exp_avg_absmax is float32 [1] there, missing here; "
    )
    assert "; and " in told.value.message
    assert all(map(torch.equal, parameters, before))


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
    versions = state_of(tmp_path / "resume/step-2")["versions"]
    now = versions[library]
    change_state(tmp_path / "resume/step-2", versions=versions | {library: "0.7"})

    result, events = run(tmp_path, resume_from=tmp_path / "resume")

    assert events[0] == ResumeNotExact(2, [f"{library} was 0.7, and is {now} now."])
    assert isinstance(events[1], RunStarted)
    assert events[1].start_step == 2
    assert result.steps == TOTAL_STEPS
