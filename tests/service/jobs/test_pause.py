"""Pausing and resuming: what is answered in each state, and races with claims, ends, and each other."""

import threading
from collections.abc import Callable
from typing import Literal

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from service.db import transaction
from service.errors import InvalidRequest, NotFound
from service.jobs import wishes
from service.queue import finish
from service.queue.claim import Claim, claim
from service.tables import DEFAULT_PROJECT, Attempt, Event, Job
from tests.service.jobs.conftest import Create

Kind = Literal["validate", "train"]
Sessions = sessionmaker[Session]
ERROR = {"code": "c", "message": "m", "param": None}


def wish(sessions: Sessions, what: str, job_id: str) -> str:
    """Pause, resume or cancel a job and return its status as the call leaves it."""
    act: Callable[..., Job] = getattr(wishes, what)
    with transaction(sessions) as session:
        return act(session, DEFAULT_PROJECT, job_id).status


def take(sessions: Sessions, kind: Kind) -> Claim | None:
    with transaction(sessions) as session:
        return claim(session, kind=kind, worker_id="w", host="h", lease_s=60)


def held(sessions: Sessions, kind: Kind) -> Claim:
    taken = take(sessions, kind)
    assert taken is not None
    return taken


def validate(sessions: Sessions) -> None:
    fence = held(sessions, "validate").fence
    with transaction(sessions) as session:
        finish.validated(session, fence, report={}, hyperparameters={})


def stop(sessions: Sessions, run: Claim, *, lost: bool = False, max_attempts: int = 3) -> None:
    """What a worker says when its child is gone: the attempt ends, the job has not."""
    with transaction(sessions) as session:
        finish.give_back(session, run.fence, lost=lost, reason="it died", max_attempts=max_attempts)


def told(session: Session) -> list[str]:
    return list(session.scalars(select(Event.message).order_by(Event.seq)))


@pytest.fixture
def queued(create: Create, sessions: Sessions) -> str:
    """A job that waits for training."""
    job_id = create()
    validate(sessions)
    return job_id


@pytest.fixture
def run(queued: str, sessions: Sessions) -> Claim:
    """A job at training."""
    return held(sessions, "train")


def test_a_queued_job_is_paused_at_once_and_nobody_claims_it(
    queued: str, sessions: Sessions, session: Session
) -> None:
    status = wish(sessions, "pause", queued)

    job = session.get_one(Job, queued)
    assert status == job.status == "paused"
    assert job.paused_at is not None
    assert take(sessions, "train") is None
    assert told(session)[-1] == "Fine-tuning job paused"


def test_a_resumed_job_can_be_claimed_again(
    queued: str, sessions: Sessions, session: Session
) -> None:
    wish(sessions, "pause", queued)

    status = wish(sessions, "resume", queued)

    job = session.get_one(Job, queued)
    assert status == job.status == "queued"
    assert (job.desired, job.paused_at) == ("run", None)
    assert told(session)[-1] == "Fine-tuning job resumed: it waits for a worker"
    assert held(sessions, "train").job.id == queued


def test_of_a_training_job_the_wish_is_noted_and_it_is_paused_when_its_child_is_gone(
    run: Claim, sessions: Sessions, session: Session
) -> None:
    status = wish(sessions, "pause", run.job.id)
    stop(sessions, run)

    job = session.get_one(Job, run.job.id)
    assert status == "running"
    assert (job.status, job.lease_owner, job.lost_attempts) == ("paused", None, 0)
    assert session.get_one(Attempt, (job.id, 2)).outcome == "paused"
    assert told(session)[-2:] == [
        "Pausing: the job is paused when it has stopped",
        "Fine-tuning job paused",
    ]


def test_a_job_that_is_validated_is_paused_after_its_validation(
    create: Create, sessions: Sessions, session: Session
) -> None:
    job_id = create()

    before = wish(sessions, "pause", job_id)
    validate(sessions)

    job = session.get_one(Job, job_id)
    assert (before, job.status) == ("validating_files", "paused")
    assert take(sessions, "train") is None
    assert told(session)[-1] == "Files validated, moving job to paused state"


def test_a_validation_that_is_lost_is_made_again_although_a_pause_is_wished(
    create: Create, sessions: Sessions, session: Session
) -> None:
    job_id = create()
    first = held(sessions, "validate")
    wish(sessions, "pause", job_id)

    stop(sessions, first, lost=True)
    validate(sessions)

    assert session.get_one(Job, job_id).status == "paused"


def test_a_pause_that_is_resumed_before_the_child_is_gone_ends_in_the_queue(
    run: Claim, sessions: Sessions, session: Session
) -> None:
    wish(sessions, "pause", run.job.id)

    status = wish(sessions, "resume", run.job.id)
    stop(sessions, run)

    job = session.get_one(Job, run.job.id)
    assert status == "running"
    assert (job.status, job.lost_attempts) == ("queued", 0)
    assert held(sessions, "train").fence.attempt_no == 3


def test_a_worker_lost_on_the_way_to_a_pause_counts_and_the_job_is_paused(
    run: Claim, sessions: Sessions, session: Session
) -> None:
    wish(sessions, "pause", run.job.id)

    stop(sessions, run, lost=True)

    job = session.get_one(Job, run.job.id)
    assert (job.status, job.lost_attempts) == ("paused", 1)
    assert session.get_one(Attempt, (job.id, 2)).outcome == "lost"
    assert told(session)[-1] == "Fine-tuning job paused: it died"


def test_the_last_allowed_loss_fails_a_job_that_was_to_be_paused(
    run: Claim, sessions: Sessions, session: Session
) -> None:
    wish(sessions, "pause", run.job.id)

    stop(sessions, run, lost=True, max_attempts=1)

    assert session.get_one(Job, run.job.id).status == "failed"


def test_an_end_is_an_end_although_a_pause_was_wished(
    run: Claim, sessions: Sessions, session: Session
) -> None:
    wish(sessions, "pause", run.job.id)

    with transaction(sessions) as own:
        finish.failed(own, run.fence, ERROR)

    assert session.get_one(Job, run.job.id).status == "failed"


def test_a_paused_job_is_cancelled_at_once(
    queued: str, sessions: Sessions, session: Session
) -> None:
    wish(sessions, "pause", queued)

    status = wish(sessions, "cancel", queued)

    job = session.get_one(Job, queued)
    assert status == job.status == "cancelled"
    assert job.paused_at is None


def test_a_cancel_of_a_job_on_its_way_to_a_pause_wins(
    run: Claim, sessions: Sessions, session: Session
) -> None:
    wish(sessions, "pause", run.job.id)

    status = wish(sessions, "cancel", run.job.id)
    stop(sessions, run)

    job = session.get_one(Job, run.job.id)
    assert (status, job.status, job.desired) == ("running", "cancelled", "cancel")


@pytest.mark.parametrize("what", ["pause", "resume"])
def test_the_same_wish_again_changes_nothing_and_is_told_once(
    queued: str, sessions: Sessions, session: Session, what: str
) -> None:
    wish(sessions, "pause", queued)
    first = wish(sessions, what, queued)
    events = len(told(session))

    again = wish(sessions, what, queued)

    assert again == first
    session.expire_all()
    assert len(told(session)) == events


def test_a_second_wish_to_pause_a_training_job_is_told_once(
    run: Claim, sessions: Sessions, session: Session
) -> None:
    wish(sessions, "pause", run.job.id)

    wish(sessions, "pause", run.job.id)

    assert told(session).count("Pausing: the job is paused when it has stopped") == 1


@pytest.mark.parametrize("what", ["pause", "resume"])
def test_an_ended_job_and_one_being_cancelled_are_refused_in_a_sentence(
    run: Claim, sessions: Sessions, what: str
) -> None:
    wish(sessions, "cancel", run.job.id)

    with pytest.raises(InvalidRequest, match=f"is being cancelled, so it cannot be {what}d"):
        wish(sessions, what, run.job.id)

    stop(sessions, run)
    with pytest.raises(
        InvalidRequest, match=f"been cancelled; only a job that has not ended can be {what}d"
    ):
        wish(sessions, what, run.job.id)


@pytest.mark.parametrize("what", ["pause", "resume"])
def test_an_unknown_job_is_not_found(sessions: Sessions, what: str) -> None:
    with pytest.raises(NotFound, match="No such fine-tuning job: ftjob-none"):
        wish(sessions, what, "ftjob-none")


@pytest.mark.parametrize("round_", range(6))
def test_a_pause_and_a_claim_never_both_get_a_queued_job(
    queued: str, sessions: Sessions, session: Session, round_: int
) -> None:
    claims: list[Claim | None] = []

    at_once(lambda: claims.append(take(sessions, "train")), lambda: wish(sessions, "pause", queued))

    job = session.get_one(Job, queued)
    if claims[0] is None:
        assert (job.status, job.lease_owner) == ("paused", None)
    else:
        assert (job.status, job.desired, job.lease_owner) == ("running", "pause", "w")


@pytest.mark.parametrize("round_", range(6))
def test_a_pause_and_an_end_never_both_count(
    run: Claim, sessions: Sessions, session: Session, round_: int
) -> None:
    refusals: list[InvalidRequest] = []

    def end() -> None:
        with transaction(sessions) as own:
            finish.failed(own, run.fence, ERROR)

    def pause() -> None:
        try:
            wish(sessions, "pause", run.job.id)
        except InvalidRequest as error:
            refusals.append(error)

    at_once(end, pause)

    job = session.get_one(Job, run.job.id)
    assert job.status == "failed"
    assert job.desired == ("run" if refusals else "pause")


def test_pauses_at_once_pause_once_and_resumes_at_once_resume_once(
    queued: str, sessions: Sessions, session: Session
) -> None:
    at_once(*[lambda: wish(sessions, "pause", queued)] * 4)
    paused = told(session)
    session.rollback()

    at_once(*[lambda: wish(sessions, "resume", queued)] * 4)

    assert paused.count("Fine-tuning job paused") == 1
    assert told(session).count("Fine-tuning job resumed: it waits for a worker") == 1
    assert session.get_one(Job, queued).status == "queued"


def test_a_preempted_job_waits_again_and_nothing_is_counted(
    run: Claim, sessions: Sessions, session: Session
) -> None:
    with transaction(sessions) as own:
        asked = wishes.preempt(own, DEFAULT_PROJECT, run.job.id)
    with transaction(sessions) as own:
        again = wishes.preempt(own, DEFAULT_PROJECT, run.job.id)
    stop(sessions, run)

    job = session.get_one(Job, run.job.id)
    assert (asked, again) == (True, False)
    assert (job.status, job.desired, job.lost_attempts) == ("queued", "run", 0)
    assert session.get_one(Attempt, (job.id, 2)).outcome == "requeued"
    assert held(sessions, "train").fence.attempt_no == 3


def test_a_pause_of_a_job_that_is_being_preempted_pauses_it(
    run: Claim, sessions: Sessions, session: Session
) -> None:
    with transaction(sessions) as own:
        wishes.preempt(own, DEFAULT_PROJECT, run.job.id)

    wish(sessions, "pause", run.job.id)
    stop(sessions, run)

    assert session.get_one(Job, run.job.id).status == "paused"


def test_only_a_training_job_is_preempted(queued: str, sessions: Sessions) -> None:
    with transaction(sessions) as own:
        assert wishes.preempt(own, DEFAULT_PROJECT, queued) is False
    with pytest.raises(NotFound), transaction(sessions) as own:
        wishes.preempt(own, DEFAULT_PROJECT, "ftjob-none")


def at_once(*acts: Callable[[], object]) -> None:
    """Call all of them in threads that start together."""
    start = threading.Barrier(len(acts))

    def run(act: Callable[[], object]) -> None:
        start.wait()
        act()

    threads = [threading.Thread(target=run, args=[act]) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
