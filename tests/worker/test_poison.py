"""A job whose children die one after another, by signals that are real: it fails, and takes nobody else along."""

import signal
from collections.abc import Callable

import psutil
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from service.tables import Attempt, Event
from tests.worker.conftest import Await, Submit, chat_lines, wait_until
from worker.crew import Crew


def test_three_lost_children_in_a_row_fail_the_job_as_poison(
    crew: Crew,
    submit: Submit,
    await_job: Await,
    story: Callable[[str], list[Event]],
    sessions: sessionmaker[Session],
) -> None:
    job_id = submit(chat_lines(2000, words=25), hyperparameters={"n_epochs": 50, "batch_size": 1})
    crew.ring("validate")

    def pid_of(attempt_no: int) -> int | None:
        with sessions() as session:
            attempt = session.get(Attempt, (job_id, attempt_no))
            return None if attempt is None else attempt.pid

    for attempt_no in (2, 3, 4):
        wait_until(lambda attempt_no=attempt_no: pid_of(attempt_no))
        pid = pid_of(attempt_no)
        assert pid is not None
        psutil.Process(pid).send_signal(signal.SIGKILL)
    job = await_job(job_id, "failed")

    assert job.error is not None
    assert job.error["code"] == "worker_lost"
    assert "lost 3 times in a row" in job.error["message"]
    assert "SIGKILL" in job.error["message"]
    assert "memory" in job.error["hint"]
    with sessions() as session:
        outcomes = session.scalars(
            select(Attempt.outcome).where(Attempt.job_id == job_id).order_by(Attempt.attempt_no)
        ).all()
    assert outcomes == ["succeeded", "lost", "lost", "lost"]
    assert [e.level for e in story(job_id) if "back to the queue" in e.message] == ["warn"] * 2
