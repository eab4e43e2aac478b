import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from sqlalchemy import func, update
from sqlalchemy.orm import Session, sessionmaker

from service.db import transaction
from service.queue import background, repository
from service.queue.claim import Claim
from service.queue.kick import Doorbell
from service.settings import Settings
from service.tables import Job

MakeJob = Callable[..., str]
MakeClaim = Callable[..., Claim | None]


@pytest.fixture
def doorbell(settings: Settings) -> Iterator[Doorbell]:
    doorbell = Doorbell(settings)
    yield doorbell
    doorbell.close()


def test_a_pass_rings_for_the_kinds_of_work_that_wait(
    settings: Settings, sessions: sessionmaker[Session], doorbell: Doorbell, make_job: MakeJob
) -> None:
    idle = background.run_once(settings, sessions, doorbell)
    make_job()

    rung = background.run_once(settings, sessions, doorbell)

    assert (idle, rung) == (set(), {"train"})


def test_two_processes_never_make_a_pass_at_once(
    settings: Settings, sessions: sessionmaker[Session], doorbell: Doorbell
) -> None:
    with transaction(sessions) as other:
        assert repository.try_loops_lock(other)
        during = background.run_once(settings, sessions, doorbell)

    after = background.run_once(settings, sessions, doorbell)

    assert (during, after) == (None, set())


def test_the_loop_takes_back_an_ended_lease_by_itself(
    settings: Settings,
    sessions: sessionmaker[Session],
    session: Session,
    make_job: MakeJob,
    make_claim: MakeClaim,
) -> None:
    job_id = make_job()
    make_claim()
    long_ago = func.now() - timedelta(hours=1)
    session.execute(update(Job).values(lease_until=long_ago))
    session.commit()
    impatient = settings.model_copy(update={"lease_s": 0.01, "reap_s": 0.05})

    stop = background.start(impatient, sessions)
    deadline = time.monotonic() + 60
    while session.get_one(Job, job_id).status == "running" and time.monotonic() < deadline:
        session.rollback()
        session.expire_all()
        time.sleep(0.05)
    stop()

    assert session.get_one(Job, job_id).status == "queued"
