"""Cancelling races with claims, ends and other cancels; exactly one of them wins."""

import threading

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from service.db import transaction
from service.errors import InvalidRequest, NotFound
from service.jobs import wishes
from service.jobs.state import Fenced
from service.queue import finish
from service.queue.claim import Claim, claim
from service.tables import DEFAULT_PROJECT, Event, Job, Outbox
from tests.service.jobs.conftest import Create


def cancel(sessions: sessionmaker[Session], job_id: str) -> str:
    with transaction(sessions) as session:
        return wishes.cancel(session, DEFAULT_PROJECT, job_id).status


def take(sessions: sessionmaker[Session]) -> Claim | None:
    with transaction(sessions) as session:
        return claim(session, kind="validate", worker_id="w", host="h", lease_s=60)


def test_a_job_that_nobody_holds_ends_at_once_with_its_event_and_outbox_row(
    create: Create, sessions: sessionmaker[Session], session: Session
) -> None:
    job_id = create()

    status = cancel(sessions, job_id)

    job = session.get_one(Job, job_id)
    assert status == job.status == "cancelled"
    assert job.finished_at is not None
    assert session.scalars(select(Outbox.type)).all() == ["fine_tuning.job.cancelled"]
    told = session.scalars(select(Event.message).order_by(Event.seq)).all()
    assert told[-1] == "Fine-tuning job cancelled"


def test_of_a_held_job_only_the_wish_is_written(
    create: Create, sessions: sessionmaker[Session], session: Session
) -> None:
    job_id = create()
    assert take(sessions) is not None

    status = cancel(sessions, job_id)

    job = session.get_one(Job, job_id)
    assert status == job.status == "validating_files"
    assert (job.desired, job.lease_owner) == ("cancel", "w")
    assert session.scalars(select(Outbox.type)).all() == []


def test_an_ended_job_is_refused_in_a_sentence(
    create: Create, sessions: sessionmaker[Session]
) -> None:
    job_id = create()
    cancel(sessions, job_id)

    with pytest.raises(InvalidRequest, match="has already been cancelled; only a job"):
        cancel(sessions, job_id)


def test_an_unknown_job_is_not_found(sessions: sessionmaker[Session]) -> None:
    with pytest.raises(NotFound, match="No such fine-tuning job: ftjob-none"):
        cancel(sessions, "ftjob-none")


@pytest.mark.parametrize("round_", range(8))
def test_a_cancel_and_a_claim_never_both_get_an_unheld_job(
    create: Create, sessions: sessionmaker[Session], session: Session, round_: int
) -> None:
    job_id = create()
    start = threading.Barrier(2)
    claims: list[Claim | None] = []

    def claimer() -> None:
        start.wait()
        claims.append(take(sessions))

    def canceller() -> None:
        start.wait()
        cancel(sessions, job_id)

    threads = [threading.Thread(target=claimer), threading.Thread(target=canceller)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    job = session.get_one(Job, job_id)
    if claims[0] is None:
        assert (job.status, job.lease_owner) == ("cancelled", None)
    else:
        assert (job.status, job.desired, job.lease_owner) == ("validating_files", "cancel", "w")


@pytest.mark.parametrize("round_", range(8))
def test_a_cancel_and_an_end_never_both_count(
    create: Create, sessions: sessionmaker[Session], session: Session, round_: int
) -> None:
    job_id = create()
    held = take(sessions)
    assert held is not None
    start = threading.Barrier(2)
    refusals: list[Exception] = []

    def worker() -> None:
        start.wait()
        with transaction(sessions) as own:
            finish.failed(own, held.fence, {"code": "c", "message": "m", "param": None})

    def canceller() -> None:
        start.wait()
        try:
            cancel(sessions, job_id)
        except InvalidRequest as error:
            refusals.append(error)

    threads = [threading.Thread(target=worker), threading.Thread(target=canceller)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    job = session.get_one(Job, job_id)
    # Whoever comes second sees the first: a cancel of an ended job is refused, a wish to cancel is fulfilled.
    ended_as = "failed" if refusals else "cancelled"
    assert job.status == ended_as
    assert job.desired == ("run" if refusals else "cancel")
    assert session.scalars(select(Outbox.type)).all() == [f"fine_tuning.job.{ended_as}"]


def test_two_cancels_at_once_end_the_job_once(
    create: Create, sessions: sessionmaker[Session], session: Session
) -> None:
    job_id = create()
    start = threading.Barrier(4)
    outcomes: list[str] = []

    def canceller() -> None:
        start.wait()
        try:
            outcomes.append(cancel(sessions, job_id))
        except InvalidRequest:
            outcomes.append("refused")

    threads = [threading.Thread(target=canceller) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(outcomes) == ["cancelled", "refused", "refused", "refused"]
    assert session.scalars(select(Outbox.type)).all() == ["fine_tuning.job.cancelled"]


def test_a_worker_that_lost_its_job_to_a_cancel_writes_nothing(
    create: Create, sessions: sessionmaker[Session]
) -> None:
    job_id = create()
    held = take(sessions)
    assert held is not None
    with transaction(sessions) as session:
        finish.cancelled(session, held.fence)

    with pytest.raises(Fenced), transaction(sessions) as session:
        finish.failed(session, held.fence, {"code": "c", "message": "m", "param": None})

    with transaction(sessions) as session:
        assert session.get_one(Job, job_id).status == "cancelled"
