"""One real training child under one supervisor: told in time, frozen in an outage, killed when the job is another's."""

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from sqlalchemy import select, update
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session, sessionmaker

from operations.embedded import postgres
from service import clock
from service.settings import Settings
from service.tables import Attempt, Event, Job
from tests.worker.conftest import chat_lines
from worker.crew import Crew
from worker.relay import CHECKPOINT

Submit = Callable[..., str]
Await = Callable[..., Job]
Story = Callable[[str], list[Event]]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """A lease so short that an outage outlives it."""
    return settings.model_copy(update={"lease_s": 3.0, "renew_s": 0.3})


def wait_until(what: Callable[[], object], *, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.03)


def steps(story: Story, job_id: str) -> list[int]:
    return [e.data["step"] for e in story(job_id) if e.type == "metrics" and e.data]


def train(crew: Crew, submit: Submit, story: Story, *, epochs: int) -> str:
    """Submit a job of forty steps an epoch and return when its second step is told."""
    body = {"n_epochs": epochs, "batch_size": 2}
    job_id = submit(chat_lines(80, words=25), hyperparameters=body)
    crew.ring("validate")
    wait_until(lambda: len(steps(story, job_id)) >= 2, timeout_s=60)
    return job_id


def training_children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "train" in child.cmdline()]


def busiest() -> psutil.Process:
    return max(training_children(), key=lambda child: child.cpu_times().user)


def test_a_step_is_in_the_database_within_a_second(
    crew: Crew, submit: Submit, await_job: Await, story: Story, sessions: sessionmaker[Session]
) -> None:
    job_id = submit(chat_lines(12), hyperparameters={"n_epochs": 1, "batch_size": 1})
    crew.ring("validate")
    delays_s: dict[int, float] = {}

    def is_done() -> bool:
        with sessions() as session:
            events = session.execute(
                select(Event.seq, Event.created_at).where(
                    Event.job_id == job_id, Event.type == "metrics"
                )
            ).all()
            now = clock.now()
            for seq, created_at in events:
                delays_s.setdefault(seq, (now - created_at).total_seconds())
            return session.get_one(Job, job_id).finished_at is not None

    wait_until(is_done, timeout_s=60)

    assert await_job(job_id, "succeeded").error is None
    assert len(delays_s) == 12
    assert max(delays_s.values()) < 1.0


def test_an_outage_longer_than_the_lease_freezes_the_child_and_costs_nothing(
    crew: Crew,
    submit: Submit,
    await_job: Await,
    story: Story,
    session: Session,
    settings: Settings,
    postgres_server: postgres.Postgres,
) -> None:
    job_id = train(crew, submit, story, epochs=4)  # longer than the lease, on a fast machine too
    child = busiest()
    assert settings.database_url is not None
    name = make_url(settings.database_url.get_secret_value()).database
    with postgres_server.connect() as admin:
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
        admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name]
        )
        try:
            wait_until(lambda: child.status() == psutil.STATUS_STOPPED, timeout_s=8)
            time.sleep(1.0)
            stayed_frozen = child.status() == psutil.STATUS_STOPPED
        finally:
            admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())

    job = await_job(job_id, "succeeded", timeout_s=60)

    assert stayed_frozen
    assert (job.attempt_no, job.lost_attempts) == (2, 0)
    assert steps(story, job_id) == list(range(1, 161))


@pytest.mark.parametrize(
    "poison",
    [
        pytest.param({"at": 1e300}, id="relay"),  # no time that a calendar has
        pytest.param({"data": {"kind": CHECKPOINT, "step": 1, "folder": "a\0b"}}, id="publisher"),
    ],
)
def test_an_unexpected_error_beside_the_child_gives_the_job_back_with_the_reason(
    crew: Crew, submit: Submit, await_job: Await, story: Story, poison: dict[str, Any]
) -> None:
    job_id = train(crew, submit, story, epochs=20)
    line = {"n": 10**6, "at": 1.0, "level": "info", "type": "message", "message": "m", "data": {}}

    with crew.context.folder(job_id, 2).events.open("a", encoding="utf-8") as events:
        events.write(json.dumps(line | poison) + "\n")
    await_job(job_id, until=lambda job: job.lost_attempts > 0, timeout_s=20)

    told = [event.message for event in story(job_id)]
    assert any("its worker met an unexpected error (" in message for message in told), told
    crew.stop()
    assert [t.name for t in threading.enumerate() if job_id in t.name] == []


def test_a_child_whose_job_was_given_to_another_is_killed_and_nothing_more_is_told(
    crew: Crew, submit: Submit, story: Story, session: Session
) -> None:
    job_id = train(crew, submit, story, epochs=20)
    child = busiest()

    session.execute(
        update(Job)
        .where(Job.id == job_id)
        .values(attempt_no=Job.attempt_no + 1, lease_owner="worker_other")
    )
    session.commit()
    told = len(story(job_id))
    wait_until(lambda: not child.is_running(), timeout_s=5)
    time.sleep(0.5)

    assert len(story(job_id)) == told
    job = session.get_one(Job, job_id)
    assert (job.status, job.lease_owner) == ("running", "worker_other")
    assert (
        session.get_one(Attempt, (job_id, 2)).outcome is None
    )  # for the other to say, or the reaper
