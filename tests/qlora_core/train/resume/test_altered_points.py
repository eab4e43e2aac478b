"""Resume points that nothing of ours has written, with sums that fit: refused by name, and the one before is taken."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_core.errors import ResumePointError
from qlora_core.train import Event, Notice, ResumeNotExact, RunStarted, TrainResult
from tests.qlora_core.train.resume.changed_points import change_state, state_of
from tests.qlora_core.train.resume.tiny_points import TinyRun, taken

Run = Callable[..., tuple[TrainResult, list[Event]]]


def change_tensors(
    point: Path, name: str, change: Callable[[dict[str, torch.Tensor]], Any]
) -> None:
    file = point / f"{name}.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    manifest = point / "manifest.json"
    sums = json.loads(manifest.read_text()) | {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
    }
    manifest.write_text(json.dumps(sums))


def be_a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def be_a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def change_progress(point: Path, **changes: Any) -> None:
    change_state(point, progress=state_of(point)["progress"] | changes)


ALTERED: dict[str, Callable[[Path], object]] = {
    "state is a pipe": lambda p: be_a_fifo(p / "state.json"),
    "manifest is a pipe": lambda p: be_a_fifo(p / "manifest.json"),
    "tensors are a pipe": lambda p: be_a_fifo(p / "adapter.safetensors"),
    "state is a link": lambda p: be_a_link(p / "state.json"),
    "manifest nested too deeply": lambda p: (p / "manifest.json").write_text("[" * 200_000),
    "manifest too large": lambda p: (p / "manifest.json").write_text(" " * 2**23 + "{}"),
    "versions are a list": lambda p: change_state(p, versions=[1]),
    "a version is a number": lambda p: change_state(p, versions={"torch": 2}),
    "plan is a list": lambda p: change_state(p, plan=[1]),
    "identity is a list": lambda p: change_state(p, identity=[1]),
    "no progress": lambda p: change_state(p, progress=None),
    "negative window": lambda p: change_progress(p, window=-1),
    "half an epoch": lambda p: change_progress(p, epoch=1.5),
    "true as a step": lambda p: change_progress(p, step=True),
    "step of another folder": lambda p: change_progress(p, step=1),
    "beyond any number": lambda p: change_progress(p, seen_tokens=10**30),
    "best step to come": lambda p: change_progress(p, best_step=3),
    "unknown moment": lambda p: change_tensors(p, "optimizer", lambda t: t.update({"zzz.m": torch.zeros(1)})),
    "no random state": lambda p: change_tensors(p, "random", lambda t: t.clear()),
    "random state of another size": lambda p: change_tensors(p, "random", lambda t: t.update(cpu=torch.zeros(3, dtype=torch.uint8))),
    "random state of nothing": lambda p: change_tensors(p, "random", lambda t: t.update({"cuda.0": torch.zeros(16, dtype=torch.uint8)})),
    "adapter of half the bits": lambda p: change_tensors(p, "adapter", lambda t: t.update({k: v.half() for k, v in t.items()})),
}  # fmt: skip


@pytest.mark.timeout(20)
@pytest.mark.parametrize("alter", ALTERED)
def test_an_altered_point_is_refused_and_the_one_before_is_taken(
    alter: str, tmp_path: Path
) -> None:
    run = TinyRun()
    run.write(tmp_path, 1)
    ALTERED[alter](run.write(tmp_path, 2))

    found = taken(tmp_path)

    assert found == (1, ["step-2"])


@pytest.mark.parametrize(
    "changes",
    [{"window": 2}, {"window": 4000}, {"epoch": 0}, {"epoch": 77}, {"window": 3, "epoch": 0}],
    ids=str,
)
def test_a_place_in_an_epoch_that_is_none_of_its_step_is_refused(
    changes: dict[str, int], run: Run, tmp_path: Path
) -> None:
    run(tmp_path, stop_after=4)
    change_progress(tmp_path / "resume/step-4", **changes)

    _, events = run(tmp_path, resume_from=tmp_path / "resume")

    assert isinstance(events[0], Notice)
    assert events[0].message.startswith("The resume point step-4 is torn")
    started = next(event for event in events if isinstance(event, RunStarted))
    assert started.start_step == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"threads": float("nan")},
        {"threads": -1},
        {"threads": 10**9},
        {"notch": -1},
        {"pass_tokens": -1},
        {"micro_batch_tokens": 0},
        {"loss_chunk_tokens": 0},
        {"recompute": 1},
        {"asked": None},
    ],
    ids=str,
)
def test_a_plan_that_cannot_be_is_not_followed_and_that_is_told(
    changes: dict[str, Any], run: Run, tmp_path: Path
) -> None:
    run(tmp_path, stop_after=2)
    point = tmp_path / "resume/step-2"
    change_state(point, plan=state_of(point)["plan"] | changes)

    _, events = run(tmp_path, resume_from=tmp_path / "resume")

    assert isinstance(events[0], ResumeNotExact)
    assert events[0].reasons == [
        f"The plan of its steps cannot be followed: its {next(iter(changes))} cannot be."
    ]


@pytest.mark.parametrize("change", ["one more", "one less"])
def test_a_point_of_another_version_of_the_engine_ends_the_run_and_stays(
    change: str, tmp_path: Path
) -> None:
    point = TinyRun().write(tmp_path, 2)
    progress = state_of(point)["progress"]
    if change == "one more":
        change_state(point, progress=progress | {"foo": 1})
    else:
        change_state(point, progress={k: v for k, v in progress.items() if k != "window"})

    with pytest.raises(ResumePointError, match=r"another version of the engine: (foo|window)\."):
        taken(tmp_path)
