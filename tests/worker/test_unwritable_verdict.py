"""The end of an attempt that the database does not take: for now, or never."""

import time
from collections.abc import Callable

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from service.db import transaction
from service.jobs import wishes
from service.settings import Settings
from service.tables import DEFAULT_PROJECT, Event, Job
from tests.worker.conftest import chat_lines
from worker.crew import Crew

Submit = Callable[..., str]
Await = Callable[..., Job]

PROGRAM_LIMIT_EXCEEDED, DISK_FULL = "54000", "53100"

Refuse = Callable[[str], None]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Nobody trains, and after one more try a lost attempt is the job's end."""
    return settings.model_copy(update={"train_slots": 0, "max_attempts": 2})


@pytest.fixture
def refuse_reports(sessions: sessionmaker[Session]) -> Refuse:
    """Have PostgreSQL refuse every dataset report, with this SQLSTATE, and count the tries."""

    def refuse(sqlstate: str) -> None:
        statements = [
            "CREATE SEQUENCE tries",  # counts on though the transaction is rolled back
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM nextval('tries');"
            f" RAISE EXCEPTION 'it is refused' USING ERRCODE = '{sqlstate}'; END $$",
            "CREATE TRIGGER refuse BEFORE UPDATE OF dataset_report ON jobs FOR EACH ROW"
            " WHEN (NEW.dataset_report IS NOT NULL) EXECUTE FUNCTION refuse()",
        ]
        with transaction(sessions) as session:
            for statement in statements:
                session.execute(text(statement))

    return refuse


def await_tries(sessions: sessionmaker[Session], count: int) -> None:
    deadline = time.monotonic() + 90
    while True:
        with transaction(sessions) as session:
            if session.scalar(text("SELECT last_value FROM tries")) >= count:
                return
        assert time.monotonic() < deadline, "nobody tries"
        time.sleep(0.05)


def test_a_verdict_that_the_database_refuses_ends_the_job_with_a_reason(
    crew: Crew, submit: Submit, await_job: Await, refuse_reports: Refuse
) -> None:
    refuse_reports(PROGRAM_LIMIT_EXCEEDED)
    refused = submit(chat_lines(12))
    crew.ring("validate")

    job = await_job(refused, "failed")

    assert job.error is not None
    assert "OperationalError" in job.error["message"]


def test_a_cancel_is_carried_out_while_a_verdict_waits_for_the_database(
    crew: Crew,
    submit: Submit,
    await_job: Await,
    story: Callable[[str], list[Event]],
    refuse_reports: Refuse,
    sessions: sessionmaker[Session],
) -> None:
    refuse_reports(DISK_FULL)
    waiting = submit(["no example"] * 12)
    crew.ring("validate")
    await_tries(sessions, 2)

    with transaction(sessions) as session:
        wishes.cancel(session, DEFAULT_PROJECT, waiting)
    job = await_job(waiting, "cancelled")

    assert (job.attempt_no, job.error) == (1, None)
    assert story(waiting)[-1].message == "Fine-tuning job cancelled"
