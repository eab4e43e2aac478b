"""A real run that is killed within its first epoch: what was saved by the clock is not done again."""

import signal
from collections.abc import Callable

import pytest
from sqlalchemy.orm import Session, sessionmaker

from service.settings import Settings
from service.tables import Attempt, Event
from tests.worker.conftest import Await, Submit, chat_lines, training_child, wait_until
from worker.crew import Crew

STEPS = 120


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """A resume point after each step: so long has always passed."""
    return settings.model_copy(update={"resume_point_every_s": 0.0})


def test_a_run_killed_within_an_epoch_goes_on_within_it(
    crew: Crew,
    submit: Submit,
    await_job: Await,
    story: Callable[[str], list[Event]],
    sessions: sessionmaker[Session],
) -> None:
    job_id = submit(chat_lines(STEPS, words=25), hyperparameters={"n_epochs": 1, "batch_size": 1})
    crew.ring("validate")
    child = training_child(sessions, job_id)
    points = crew.context.folder(job_id, 2).run / "resume"
    wait_until(lambda: list(points.glob("step-*")))

    child.send_signal(signal.SIGKILL)
    job = await_job(job_id, "succeeded")

    with sessions() as session:
        second = session.get_one(Attempt, (job_id, 3))
    assert job.lost_attempts == 1
    assert second.resumed_from_step is not None
    assert 0 < second.resumed_from_step < STEPS
    steps = [
        (e.attempt_no, e.data["step"])
        for e in story(job_id)
        if e.data and e.data.get("kind") == "step_metrics"
    ]
    assert len(set(steps)) == len(steps)
    assert [step for attempt_no, step in steps if attempt_no == 3] == list(
        range(second.resumed_from_step + 1, STEPS + 1)
    )
    assert {step for _, step in steps} == set(range(1, STEPS + 1))
