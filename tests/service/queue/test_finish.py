import signal
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from service.db import transaction
from service.jobs.state import Fenced
from service.queue import finish, lease
from service.queue.claim import Claim
from service.queue.finish import LOG_TAIL
from service.tables import Attempt, Event, Job, Outbox

MakeJob = Callable[..., str]
MakeClaim = Callable[..., Claim | None]


def claimed(claim: Claim | None) -> Claim:
    assert claim is not None
    return claim


def story(session: Session, job_id: str) -> list[tuple[int, str]]:
    rows = session.execute(
        select(Event.seq, Event.message).where(Event.job_id == job_id).order_by(Event.seq)
    )
    return [(seq, message) for seq, message in rows]


def test_a_good_validation_queues_the_job_with_its_report_and_hyperparameters(
    make_job: MakeJob, make_claim: MakeClaim, session: Session, sessions: sessionmaker[Session]
) -> None:
    make_job(status="validating_files", lost_attempts=1)
    fence = claimed(make_claim("validate")).fence

    with transaction(sessions) as tx:
        finish.validated(tx, fence, report={"n_examples": 12}, hyperparameters={"n_epochs": 3})

    job = session.get_one(Job, fence.job_id)
    assert (job.status, job.lease_owner, job.lost_attempts) == ("queued", None, 0)
    assert (job.dataset_report, job.hyperparameters) == ({"n_examples": 12}, {"n_epochs": 3})
    assert session.get_one(Attempt, (job.id, 1)).outcome == "succeeded"
    assert story(session, job.id)[-1] == (2, "Files validated, moving job to queued state")


def test_a_validated_job_that_should_be_cancelled_is_not_queued(
    make_job: MakeJob, make_claim: MakeClaim, session: Session, sessions: sessionmaker[Session]
) -> None:
    make_job(status="validating_files")
    fence = claimed(make_claim("validate")).fence
    with transaction(sessions) as tx:
        tx.get_one(Job, fence.job_id).desired = "cancel"

    with transaction(sessions) as tx:
        finish.validated(tx, fence, report={}, hyperparameters={})

    job = session.get_one(Job, fence.job_id)
    assert (job.status, job.lease_owner) == ("cancelled", None)
    assert session.get_one(Attempt, (job.id, 1)).outcome == "cancelled"
    assert story(session, job.id)[-1] == (2, "Fine-tuning job cancelled")


def test_success_names_the_model_and_tells_the_outside(
    make_job: MakeJob, make_claim: MakeClaim, session: Session, sessions: sessionmaker[Session]
) -> None:
    make_job()
    fence = claimed(make_claim()).fence

    with transaction(sessions) as tx:
        finish.succeeded(
            tx,
            fence,
            fine_tuned_model="ft:tiny:org::abc",
            adapter_step=3,
            trained_tokens=7,
            result_file="file-r",
            detail={},
        )

    job = session.get_one(Job, fence.job_id)
    assert (job.status, job.fine_tuned_model, job.trained_tokens) == (
        "succeeded",
        "ft:tiny:org::abc",
        7,
    )
    assert (job.result_files, job.adapter_step) == (["file-r"], 3)
    assert job.finished_at is not None
    assert [message for _, message in story(session, job.id)] == [
        "Fine-tuning job started",
        "New fine-tuned model created: ft:tiny:org::abc",
        "The job has successfully completed",
    ]
    assert session.scalars(select(Outbox.type)).all() == ["fine_tuning.job.succeeded"]


def test_a_failure_keeps_its_reason(
    make_job: MakeJob, make_claim: MakeClaim, session: Session, sessions: sessionmaker[Session]
) -> None:
    make_job()
    fence = claimed(make_claim()).fence
    error: dict[str, Any] = {
        "code": "loss_not_finite",
        "message": "The loss is NaN.",
        "param": None,
    }

    with transaction(sessions) as tx:
        finish.failed(tx, fence, error)

    job = session.get_one(Job, fence.job_id)
    assert (job.status, job.error) == ("failed", error)
    assert story(session, job.id)[-1][1] == "The loss is NaN."


def test_a_failure_that_should_be_cancelled_is_a_cancel(
    make_job: MakeJob, make_claim: MakeClaim, session: Session, sessions: sessionmaker[Session]
) -> None:
    make_job(status="validating_files")
    fence = claimed(make_claim("validate")).fence
    with transaction(sessions) as tx:
        tx.get_one(Job, fence.job_id).desired = "cancel"

    with transaction(sessions) as tx:
        finish.failed(tx, fence, {"code": "x", "message": "x", "param": None}, report={"n": 1})

    job = session.get_one(Job, fence.job_id)
    assert (job.status, job.error, job.dataset_report) == ("cancelled", None, None)
    assert session.get_one(Attempt, (job.id, 1)).outcome == "cancelled"


def test_an_orderly_stop_does_not_count_as_lost_and_the_job_can_be_claimed_again(
    make_job: MakeJob, make_claim: MakeClaim, session: Session, sessions: sessionmaker[Session]
) -> None:
    job_id = make_job()
    fence = claimed(make_claim()).fence

    with transaction(sessions) as tx:
        kind = finish.give_back(tx, fence, lost=False, reason="its worker stops", max_attempts=1)

    job = session.get_one(Job, job_id)
    assert (kind, job.status, job.lost_attempts) == ("train", "queued", 0)
    again = claimed(make_claim())
    assert (again.job.id, again.fence.attempt_no) == (job_id, 2)
    assert story(session, job_id)[-1][1] == "Fine-tuning job started again"


def test_the_last_allowed_loss_fails_the_job_with_the_reason(
    make_job: MakeJob, make_claim: MakeClaim, session: Session, sessions: sessionmaker[Session]
) -> None:
    job_id = make_job()
    kinds = []

    for _ in range(2):
        fence = claimed(make_claim()).fence
        with transaction(sessions) as tx:
            kinds.append(
                finish.give_back(
                    tx,
                    fence,
                    lost=True,
                    reason="its process was killed",
                    max_attempts=2,
                    detail={"log_tail": "/srv: the end", LOG_TAIL: "<data>: the end"},
                )
            )

    job = session.get_one(Job, job_id)
    assert kinds == ["train", None]
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "worker_lost"
    assert "its process was killed" in job.error["message"]
    assert "2 times in a row" in job.error["message"]
    # A log quotes folders of the server: as it is it is the operator's.
    assert job.error["log_tail"] == "<data>: the end"
    assert session.get_one(Attempt, (job_id, 2)).detail == {
        "log_tail": "/srv: the end",
        LOG_TAIL: "<data>: the end",
    }


def test_a_failure_shows_the_logs_end(
    make_job: MakeJob, make_claim: MakeClaim, session: Session, sessions: sessionmaker[Session]
) -> None:
    job_id = make_job()
    fence = claimed(make_claim()).fence
    error = {"code": "loss_not_finite", "message": "NaN", "param": None}

    with transaction(sessions) as tx:
        finish.failed(tx, fence, error, detail={LOG_TAIL: "the end"})

    assert session.get_one(Job, job_id).error == error | {"log_tail": "the end"}


def test_a_stop_in_good_order_between_losses_begins_their_count_anew(
    make_job: MakeJob, make_claim: MakeClaim, session: Session, sessions: sessionmaker[Session]
) -> None:
    job_id = make_job()
    counts: list[int] = []

    for lost in (True, True, False, True, True, True):
        fence = claimed(make_claim()).fence
        with transaction(sessions) as tx:
            finish.give_back(tx, fence, lost=lost, reason="it ended", max_attempts=3)
        session.expire_all()
        counts.append(session.get_one(Job, job_id).lost_attempts)

    assert counts == [1, 2, 0, 1, 2, 3]
    assert session.get_one(Job, job_id).status == "failed"


@pytest.mark.parametrize(
    ("exit_status", "of_memory"),
    [(-signal.SIGKILL, True), (-signal.SIGSEGV, False), (1, False), (None, False)],
)
def test_only_a_process_that_was_killed_is_told_to_look_to_its_memory(
    make_job: MakeJob,
    make_claim: MakeClaim,
    session: Session,
    sessions: sessionmaker[Session],
    exit_status: int | None,
    of_memory: bool,
) -> None:
    job_id = make_job()
    fence = claimed(make_claim()).fence
    detail = None if exit_status is None else {"exit_status": exit_status}

    with transaction(sessions) as tx:
        finish.give_back(tx, fence, lost=True, reason="it died", max_attempts=1, detail=detail)

    error = session.get_one(Job, job_id).error
    assert error is not None
    assert ("memory" in error["hint"]) is of_memory
    assert "log" in error["hint"]


def test_a_lost_validation_waits_for_validation_again(
    make_job: MakeJob, make_claim: MakeClaim, session: Session, sessions: sessionmaker[Session]
) -> None:
    job_id = make_job(status="validating_files")
    fence = claimed(make_claim("validate")).fence

    with transaction(sessions) as tx:
        kind = finish.give_back(tx, fence, lost=True, reason="it died", max_attempts=3)

    assert kind == "validate"
    job = session.get_one(Job, job_id)
    assert (job.status, job.lease_owner, job.lost_attempts) == ("validating_files", None, 1)
    assert claimed(make_claim("validate")).fence.attempt_no == 2


def test_a_job_that_should_be_cancelled_is_not_queued_again(
    make_job: MakeJob, make_claim: MakeClaim, session: Session, sessions: sessionmaker[Session]
) -> None:
    job_id = make_job()
    fence = claimed(make_claim()).fence
    session.get_one(Job, job_id).desired = "cancel"
    session.commit()

    with transaction(sessions) as tx:
        kind = finish.give_back(tx, fence, lost=True, reason="it died", max_attempts=3)

    session.expire_all()
    assert kind is None
    assert session.get_one(Job, job_id).status == "cancelled"


@pytest.mark.parametrize(
    "write",
    [
        lambda tx, fence: lease.renew(tx, fence, 60),
        lease.read_desired,
        finish.cancelled,
        lambda tx, fence: finish.failed(tx, fence, {"code": "x", "message": "x", "param": None}),
        lambda tx, fence: finish.give_back(tx, fence, lost=True, reason="x", max_attempts=3),
        lambda tx, fence: finish.succeeded(
            tx,
            fence,
            fine_tuned_model="m",
            adapter_step=3,
            trained_tokens=1,
            result_file="f",
            detail={},
        ),
    ],
    ids=["renew", "desired", "cancelled", "failed", "give_back", "succeeded"],
)
def test_an_attempt_whose_job_went_to_another_can_write_nothing(
    make_job: MakeJob,
    make_claim: MakeClaim,
    session: Session,
    sessions: sessionmaker[Session],
    write: Callable[[Session, Any], Any],
) -> None:
    job_id = make_job()
    zombie = claimed(make_claim(worker_id="worker_a")).fence
    with transaction(sessions) as tx:
        finish.give_back(tx, zombie, lost=True, reason="it was slow", max_attempts=3)
    claimed(make_claim(worker_id="worker_b"))
    before = story(session, job_id)

    with pytest.raises(Fenced), transaction(sessions) as tx:
        write(tx, zombie)

    session.expire_all()
    job = session.get_one(Job, job_id)
    assert (job.status, job.lease_owner, job.attempt_no) == ("running", "worker_b", 2)
    assert story(session, job_id) == before
