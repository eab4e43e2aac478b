"""SQL of leases and attempts. Every end of a lease is computed by the database's own clock."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import (
    ColumnElement,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.orm import Session

from service.tables import Attempt, Event, File, Job

_LOOPS_LOCK = 0x6E6962_02

HELD = {"validate": "validating_files", "train": "running"}
"""The status in which each kind of work is held."""


def try_loops_lock(session: Session) -> bool:
    """Take the right to run the background pass, until the transaction ends; False: another process has it."""
    return bool(session.scalar(select(func.pg_try_advisory_xact_lock(_LOOPS_LOCK))))


def from_now(seconds: float) -> ColumnElement[Any]:
    """Return a time so many seconds from the database's now; negative ones lie before it."""
    return func.now() + timedelta(seconds=seconds)


def new_lease(worker_id: str, lease_s: float) -> dict[str, Any]:
    """Return what is written into a job's row for a worker's lease from now on."""
    return {"lease_owner": worker_id, "lease_until": from_now(lease_s)}


def grant(session: Session, job_id: str, attempt_no: int, lease: dict[str, Any]) -> Job:
    """Give an attempt of a job to a worker without a move, as for a validation, and return the row; the caller holds it."""
    statement = (
        update(Job).where(Job.id == job_id).values(attempt_no=attempt_no, **lease).returning(Job)
    )
    return session.scalars(statement, execution_options={"populate_existing": True}).one()


def lock_held(session: Session, job_id: str, attempt_no: int, worker_id: str) -> Job | None:
    """Lock and return the job if this attempt of this worker holds it."""
    statement = (
        select(Job)
        .where(*_held(job_id, attempt_no, worker_id))
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    return session.scalars(statement).one_or_none()


def _held(job_id: str, attempt_no: int, worker_id: str) -> Sequence[ColumnElement[bool]]:
    return (
        Job.id == job_id,
        Job.attempt_no == attempt_no,
        Job.lease_owner == worker_id,
        Job.status.in_(tuple(HELD.values())),
    )


def renew(
    session: Session, job_id: str, attempt_no: int, worker_id: str, lease_s: float
) -> str | None:
    """Prolong the lease from now on and return the job's `desired`; None: it is not this attempt's any more."""
    statement = (
        update(Job)
        .where(*_held(job_id, attempt_no, worker_id))
        .values(lease_until=from_now(lease_s))
        .returning(Job.desired)
    )
    return session.execute(statement).scalar_one_or_none()


def desired(session: Session, job_id: str, attempt_no: int, worker_id: str) -> str | None:
    """Return the job's `desired`; None: it is not this attempt's any more."""
    return session.scalar(select(Job.desired).where(*_held(job_id, attempt_no, worker_id)))


def update_job(session: Session, job_id: str, attempt_no: int, values: dict[str, Any]) -> None:
    """Write columns other than the status, for the attempt that has the job; the caller holds the row."""
    fenced = (Job.id == job_id, Job.attempt_no == attempt_no, Job.lease_owner.is_not(None))
    session.execute(update(Job).where(*fenced).values(**values))


def lock_leases_of(session: Session, worker_id: str) -> Sequence[Job]:
    """Lock and return every job that a worker holds."""
    statement = select(Job).where(Job.lease_owner == worker_id).with_for_update()
    return session.scalars(statement.limit(1_000)).all()


def lock_ended_leases(
    session: Session, lease_s: float, margin_s: float, limit: int
) -> Sequence[Job]:
    """Lock and return jobs whose lease ended more than `margin_s` ago.

    A lease counts as at least `lease_s` long from the database server's start: nobody could renew while it was down.
    """
    amnesty = func.pg_postmaster_start_time() + timedelta(seconds=lease_s)
    ended = func.greatest(Job.lease_until, amnesty) + timedelta(seconds=margin_s)
    statement = (
        select(Job)
        .where(Job.lease_owner.is_not(None), ended < func.now())
        .order_by(Job.lease_until)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return session.scalars(statement).all()


def insert_attempt(session: Session, job: Job, *, kind: str, worker_id: str, host: str) -> None:
    """Note that an attempt begins, at the database's time."""
    values = {
        "job_id": job.id,
        "attempt_no": job.attempt_no,
        "project_id": job.project_id,
        "kind": kind,
        "worker_id": worker_id,
        "host": host,
        "started_at": func.now(),
    }
    session.execute(insert(Attempt).values(**values))


def update_attempt(session: Session, job_id: str, attempt_no: int, values: dict[str, Any]) -> None:
    """Write columns of an attempt."""
    session.execute(
        update(Attempt)
        .where(Attempt.job_id == job_id, Attempt.attempt_no == attempt_no)
        .values(**values)
    )


def end_attempt(
    session: Session, job_id: str, attempt_no: int, outcome: str, detail: dict[str, Any] | None
) -> None:
    """Note how an attempt ended, at the database's time."""
    values: dict[str, Any] = {"outcome": outcome, "ended_at": func.now()}
    if detail is not None:
        values["detail"] = detail
    update_attempt(session, job_id, attempt_no, values)


def was_trained_before(session: Session, job_id: str, attempt_no: int) -> bool:
    """Tell whether the job has an earlier training attempt."""
    statement = select(Attempt.attempt_no).where(
        Attempt.job_id == job_id, Attempt.attempt_no < attempt_no, Attempt.kind == "train"
    )
    return session.execute(statement.limit(1)).first() is not None


def training_attempts_before(session: Session, job_id: str, attempt_no: int) -> Sequence[Attempt]:
    """Return the job's earlier training attempts, newest first."""
    statement = (
        select(Attempt)
        .where(Attempt.job_id == job_id, Attempt.attempt_no < attempt_no, Attempt.kind == "train")
        .order_by(Attempt.attempt_no.desc())
        .limit(100)
    )
    return session.scalars(statement).all()


def ended_among(session: Session, job_ids: Sequence[str]) -> set[str]:
    """Return which of these jobs have ended."""
    statement = select(Job.id).where(
        Job.id.in_(job_ids), Job.status.in_(("succeeded", "failed", "cancelled"))
    )
    return set(session.scalars(statement.limit(len(job_ids))))


def told_lines(session: Session, job_id: str, attempt_no: int, first: int, last: int) -> set[int]:
    """Return which lines, from `first` to `last`, of an attempt's events.jsonl are events already."""
    statement = select(Event.line_no).where(
        Event.job_id == job_id,
        Event.attempt_no == attempt_no,
        Event.line_no.between(first, last),
    )
    lines = session.scalars(statement.limit(last - first + 1))
    return {line for line in lines if line is not None}


def blob_keys(session: Session, project_id: str, file_ids: Sequence[str]) -> dict[str, str]:
    """Return where the bytes of the project's files are; deleted files keep theirs while a live job needs them."""
    statement = select(File.id, File.blob_key).where(
        File.project_id == project_id, File.id.in_(file_ids)
    )
    return {row.id: row.blob_key for row in session.execute(statement.limit(len(file_ids)))}
