"""A real run that is paused, whose newest resume point is damaged meanwhile, and that goes on all the same.

It must end as a run that nothing ever happened to, by every step's loss, and its story must say what was wrong.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session, sessionmaker

from service.db import transaction
from service.jobs import results, wishes
from service.tables import DEFAULT_PROJECT, Event, Job
from tests.held import held_until_told_to_end
from tests.worker.conftest import Await, Submit, chat_lines, steps_done, training_child, wait_until
from worker.crew import Crew

EPOCHS, STEPS_PER_EPOCH = 4, 20


def losses(sessions: sessionmaker[Session], job_id: str) -> dict[int, tuple[Any, ...]]:
    """Of each step what a reader has who takes its newest attempt."""
    with sessions() as session:
        steps = results.steps(session, session.get_one(Job, job_id))
    return {
        step: (data["train_loss"], data["grad_norm"], data["learning_rate"])
        for step, data in steps.items()
        if "train_loss" in data
    }


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
def test_a_torn_point_is_refused_by_name_and_the_run_goes_on_from_the_one_before_to_the_same_end(
    crew: Crew,
    submit: Submit,
    await_job: Await,
    story: Callable[[str], list[Event]],
    sessions: sessionmaker[Session],
) -> None:
    lines = chat_lines(STEPS_PER_EPOCH * 2, words=25)
    body = {
        "hyperparameters": {"n_epochs": EPOCHS, "batch_size": 2, "lora_dropout": 0.1},
        "seed": 5,
    }
    broken, unbroken = submit(lines, **body), submit(lines, **body)
    crew.ring("validate")
    child = training_child(sessions, broken)
    wait_until(lambda: steps_done(crew, broken) > STEPS_PER_EPOCH + 2)
    with held_until_told_to_end(child), transaction(sessions) as session:
        wishes.pause(session, DEFAULT_PROJECT, broken)
    await_job(broken, "paused")
    points = crew.context.folder(broken, 2).run / "resume"
    before, newest = sorted(int(path.name.removeprefix("step-")) for path in points.glob("step-*"))
    flip_a_bit(points / f"step-{newest}" / "adapter.safetensors")

    with transaction(sessions) as session:
        wishes.resume(session, DEFAULT_PROJECT, broken)
    crew.ring("train")
    await_job(broken, "succeeded")
    await_job(unbroken, "succeeded")

    told = story(broken)
    refused = [e.message for e in told if e.level == "warn" and f"step-{newest}" in e.message]
    assert len(refused) == 1, [e.message for e in told if e.level == "warn"]
    assert any(e.message == f"Resumed from step {before}" for e in told)
    by_attempt = [
        (e.attempt_no, e.data["step"])
        for e in told
        if e.data and e.data.get("kind") == "step_metrics"
    ]
    again = [step for attempt_no, step in by_attempt if attempt_no != 2]
    assert len(set(by_attempt)) == len(by_attempt)
    assert sorted(again) == list(range(before + 1, EPOCHS * STEPS_PER_EPOCH + 1))
    assert losses(sessions, broken) == losses(sessions, unbroken)
    assert set(losses(sessions, broken)) == set(range(1, EPOCHS * STEPS_PER_EPOCH + 1))
