from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlalchemy import func, text, update
from sqlalchemy.orm import Session, sessionmaker

from service.db import transaction
from service.queue import lease
from service.queue.claim import Claim
from service.queue.reap import margin_s, reap
from service.queue.workers import WorkerSlots, sign_in
from service.settings import Settings
from service.tables import Attempt, Job, Worker

MakeJob = Callable[..., str]
MakeClaim = Callable[..., Claim | None]


@pytest.fixture
def patient(settings: Settings) -> Settings:
    """A lease shorter than the server has been up, so that the amnesty is over."""
    return settings.model_copy(update={"lease_s": 0.01, "max_attempts": 2})


def end_lease(session: Session, job_id: str, seconds_ago: float) -> None:
    ended = func.now() - timedelta(seconds=seconds_ago)
    session.execute(update(Job).where(Job.id == job_id).values(lease_until=ended))
    session.commit()


def test_a_job_whose_lease_ended_waits_again(
    make_job: MakeJob,
    make_claim: MakeClaim,
    session: Session,
    sessions: sessionmaker[Session],
    patient: Settings,
) -> None:
    running, checking = make_job(), make_job(status="validating_files")
    make_claim()
    make_claim("validate")
    end_lease(session, running, 60)
    end_lease(session, checking, 60)

    with transaction(sessions) as tx:
        kinds = reap(tx, patient)

    session.expire_all()
    assert kinds == {"train", "validate"}
    assert session.get_one(Job, running).status == "queued"
    assert session.get_one(Job, checking).lease_owner is None
    assert session.get_one(Attempt, (running, 1)).outcome == "lost"


def test_a_job_lost_too_often_fails_as_worker_lost(
    make_job: MakeJob,
    make_claim: MakeClaim,
    session: Session,
    sessions: sessionmaker[Session],
    patient: Settings,
) -> None:
    job_id = make_job()

    for _ in range(2):
        make_claim()
        end_lease(session, job_id, 60)
        with transaction(sessions) as tx:
            reap(tx, patient)

    session.expire_all()
    job = session.get_one(Job, job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "worker_lost"


def test_a_live_lease_and_the_margin_after_its_end_are_respected(
    make_job: MakeJob,
    make_claim: MakeClaim,
    session: Session,
    sessions: sessionmaker[Session],
    settings: Settings,
) -> None:
    live, just_ended = make_job(), make_job()
    make_claim(lease_s=60)
    make_claim()
    long = settings.model_copy(update={"lease_s": 4.0})
    end_lease(session, just_ended, margin_s(4.0) / 2)

    with transaction(sessions) as tx:
        kinds = reap(tx, long)

    session.expire_all()
    assert kinds == set()
    assert session.get_one(Job, live).status == "running"
    assert session.get_one(Job, just_ended).status == "running"


def test_a_restarted_database_gives_every_lease_a_full_length_again(
    make_job: MakeJob,
    make_claim: MakeClaim,
    session: Session,
    sessions: sessionmaker[Session],
    settings: Settings,
) -> None:
    job_id = make_job()
    make_claim()
    end_lease(session, job_id, 3600)
    uptime_s = session.scalar(
        text("SELECT extract(epoch FROM now() - pg_postmaster_start_time())::float8")
    )
    longer_than_the_server_is_up = settings.model_copy(update={"lease_s": (uptime_s or 0) + 60})

    with transaction(sessions) as tx:
        kinds = reap(tx, longer_than_the_server_is_up)

    assert kinds == set()


def test_a_dead_workers_leases_are_released_at_once_and_no_others(
    make_job: MakeJob,
    make_claim: MakeClaim,
    session: Session,
    sessions: sessionmaker[Session],
) -> None:
    dead, alive = make_job(), make_job()
    with transaction(sessions) as tx:
        sign_in(tx, worker_id="worker_dead", host="here", pid=1, slots=WorkerSlots(1, 1))
    make_claim(worker_id="worker_dead")
    make_claim(worker_id="worker_alive")

    with transaction(sessions) as tx:
        kinds = lease.release_leases_of(tx, "worker_dead", max_attempts=3)

    session.expire_all()
    assert kinds == {"train"}
    assert session.get_one(Job, dead).status == "queued"
    assert session.get_one(Job, alive).status == "running"
    assert session.get_one(Worker, "worker_dead").stopped_at is not None
