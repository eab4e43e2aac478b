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
from tests.worker.conftest import chat_lines, steps_done, training_child, wait_until
from worker.crew import Crew
from worker.relay import CHECKPOINT

Submit = Callable[..., str]
Await = Callable[..., Job]
Story = Callable[[str], list[Event]]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """A lease so short that an outage outlives it."""
    return settings.model_copy(update={"lease_s": 3.0, "renew_s": 0.3})


def steps(story: Story, job_id: str) -> list[int]:
    return [e.data["step"] for e in story(job_id) if e.type == "metrics" and e.data]


def train(crew: Crew, submit: Submit, story: Story) -> str:
    """Submit a job that no machine finishes during a test, and return when its second step is told."""
    job_id = submit(
        chat_lines(2000, words=25), hyperparameters={"n_epochs": 50, "batch_size": 1}
    )  # 100,000 steps
    crew.ring("validate")
    wait_until(lambda: len(steps(story, job_id)) >= 2)
    return job_id


def test_steps_are_in_the_database_within_a_second(
    crew: Crew, submit: Submit, story: Story, sessions: sessionmaker[Session]
) -> None:
    job_id = train(crew, submit, story)
    seen, prompt_looks = 0, 0

    def came_promptly_for_a_while() -> bool:
        nonlocal seen, prompt_looks
        with sessions() as session:
            new = session.execute(
                select(Event.seq, Event.created_at).where(
                    Event.job_id == job_id, Event.type == "metrics", Event.seq > seen
                )
            ).all()
        now = clock.now()
        if new:
            seen = max(seq for seq, _ in new)
            oldest_s = max((now - created_at).total_seconds() for _, created_at in new)
            prompt_looks = prompt_looks + 1 if oldest_s < 1 else 0
        return prompt_looks >= 20  # one busy moment of the machine is no failure

    wait_until(came_promptly_for_a_while)


def test_an_outage_longer_than_the_lease_freezes_the_child_and_costs_nothing(
    crew: Crew,
    submit: Submit,
    story: Story,
    sessions: sessionmaker[Session],
    settings: Settings,
    postgres_server: postgres.Postgres,
) -> None:
    job_id = train(crew, submit, story)
    child = training_child(sessions, job_id)
    assert settings.database_url is not None
    name = make_url(settings.database_url.get_secret_value()).database
    with postgres_server.connect() as admin:
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
        admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name]
        )
        try:
            wait_until(lambda: child.status() == psutil.STATUS_STOPPED)
            reached = steps_done(crew, job_id)
            time.sleep(1.0)
            stayed_frozen = child.status() == psutil.STATUS_STOPPED
        finally:
            admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())

    wait_until(lambda: len(steps(story, job_id)) > reached)
    crew.stop()
    with sessions() as session:
        job = session.get_one(Job, job_id)

    assert stayed_frozen
    assert (job.attempt_no, job.lost_attempts) == (2, 0)
    told = steps(story, job_id)
    assert told == list(range(1, len(told) + 1))


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
    job_id = train(crew, submit, story)
    line = {"n": 10**6, "at": 1.0, "level": "info", "type": "message", "message": "m", "data": {}}

    with crew.context.folder(job_id, 2).events.open("a", encoding="utf-8") as events:
        events.write(json.dumps(line | poison) + "\n")
    await_job(job_id, until=lambda job: job.lost_attempts > 0)

    told = [event.message for event in story(job_id)]
    assert any("its worker met an unexpected error (" in message for message in told), told
    crew.stop()
    wait_until(lambda: [t.name for t in threading.enumerate() if job_id in t.name] == [])


def test_a_child_whose_job_was_given_to_another_is_killed_and_nothing_more_is_told(
    crew: Crew,
    submit: Submit,
    story: Story,
    session: Session,
    sessions: sessionmaker[Session],
) -> None:
    job_id = train(crew, submit, story)
    child = training_child(sessions, job_id)

    session.execute(
        update(Job)
        .where(Job.id == job_id)
        .values(attempt_no=Job.attempt_no + 1, lease_owner="worker_other")
    )
    session.commit()
    told = len(story(job_id))
    wait_until(lambda: not child.is_running())
    time.sleep(0.5)

    assert len(story(job_id)) == told
    job = session.get_one(Job, job_id)
    assert (job.status, job.lease_owner) == ("running", "worker_other")
    assert (
        session.get_one(Attempt, (job_id, 2)).outcome is None
    )  # for the other to say, or the reaper
