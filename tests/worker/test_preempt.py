"""A real run that gives its slot up for another job: nothing is trained twice, nothing is counted."""

from collections.abc import Callable

from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from service.db import transaction
from service.jobs import wishes
from service.tables import DEFAULT_PROJECT, Attempt, Event, Job
from tests.held import held_until_told_to_end
from tests.worker.conftest import (
    Await,
    Submit,
    chat_lines,
    steps_done,
    training_child,
    wait_until,
)
from worker.crew import Crew

STEPS = 160


def test_a_preempted_run_goes_on_from_where_it_was(
    crew: Crew,
    submit: Submit,
    await_job: Await,
    story: Callable[[str], list[Event]],
    sessions: sessionmaker[Session],
) -> None:
    job_id = submit(chat_lines(80, words=25), hyperparameters={"n_epochs": 4, "batch_size": 2})
    crew.ring("validate")

    def steps() -> list[int]:
        return [e.data["step"] for e in story(job_id) if e.type == "metrics" and e.data]

    child = training_child(sessions, job_id)
    wait_until(lambda: steps_done(crew, job_id) >= 2)
    with held_until_told_to_end(child), transaction(sessions) as session:
        asked = wishes.preempt(session, DEFAULT_PROJECT, job_id)
    job: Job = await_job(job_id, "succeeded")

    assert asked
    assert (job.attempt_no, job.lost_attempts, job.desired) == (3, 0, "run")
    assert sorted(steps()) == list(range(1, STEPS + 1))
    with sessions() as session:
        attempts = session.scalars(
            select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.attempt_no)
        ).all()
    assert [attempt.outcome for attempt in attempts] == ["succeeded", "requeued", "succeeded"]
    assert attempts[2].resumed_from_step is not None
    assert attempts[2].resumed_from_step >= 2
