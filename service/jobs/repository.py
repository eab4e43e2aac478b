"""SQL of jobs."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, func, insert, or_, select, tuple_, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from service.tables import Event, File, Job, Outbox, Submission


def get(session: Session, project_id: str, job_id: str) -> Job | None:
    """Return the project's job, or None."""
    statement = select(Job).where(Job.project_id == project_id, Job.id == job_id)
    return session.scalars(statement).one_or_none()


def lock(session: Session, project_id: str, job_id: str) -> Job | None:
    """Return the project's job as it stands now, its row held until the transaction ends; None: there is none."""
    statement = (
        select(Job)
        .where(Job.project_id == project_id, Job.id == job_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    return session.scalars(statement).one_or_none()


def lock_creation(session: Session, project_id: str) -> None:
    """Let one create call of a project through at a time, until the transaction ends."""
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(project_id, 0))))


def insert_job(session: Session, job: Job, submission: Submission) -> None:
    """Insert a job and the fingerprint of the call that made it."""
    session.add(job)
    session.flush()
    session.add(submission)
    session.flush()


def count_waiting(session: Session, project_id: str) -> int:
    """Return how many jobs of the project are validated, wait, or are paused."""
    statement = select(func.count()).where(
        Job.project_id == project_id, Job.status.in_(("validating_files", "queued", "paused"))
    )
    return session.scalars(statement).one()


def submission_by_key(session: Session, project_id: str, key: str) -> Submission | None:
    """Return the create call that carried this `Idempotency-Key`, or None."""
    statement = select(Submission).where(
        Submission.project_id == project_id, Submission.idempotency_key == key
    )
    return session.scalars(statement).one_or_none()


def newest_submission(
    session: Session, project_id: str, api_key_id: str, body_sha256: str, since: datetime
) -> Submission | None:
    """Return the newest create call with this key and body, no older than `since`, or None."""
    statement = (
        select(Submission)
        .where(
            Submission.project_id == project_id,
            Submission.body_sha256 == body_sha256,
            Submission.api_key_id == api_key_id,
            Submission.created_at >= since,
        )
        .order_by(Submission.created_at.desc())
        .limit(1)
    )
    return session.scalars(statement).one_or_none()


def lock_file(session: Session, project_id: str, file_id: str) -> File | None:
    """Return the project's file; it cannot be deleted before the transaction ends."""
    statement = (
        select(File)
        .where(File.project_id == project_id, File.id == file_id)
        .with_for_update(read=True)
        .execution_options(populate_existing=True)
    )
    return session.scalars(statement).one_or_none()


def page(
    session: Session,
    project_id: str,
    *,
    after: str | None,
    limit: int,
    metadata: dict[str, str] | None,
    without_metadata: bool = False,
) -> Sequence[Job]:
    """Return up to `limit` jobs of the project, newest first.

    Args:
        session: the transaction.
        project_id: whose.
        after: only those after (older than) the job of this id; an unknown one has nothing after it.
        limit: at most so many.
        metadata: only those that carry all these pairs.
        without_metadata: only those that carry none.
    """
    statement = select(Job).where(Job.project_id == project_id)
    if after is not None:
        cursor = (
            select(Job.created_at, Job.id)
            .where(Job.project_id == project_id, Job.id == after)
            .subquery()
        )
        statement = statement.join(
            cursor, tuple_(Job.created_at, Job.id) < tuple_(cursor.c.created_at, cursor.c.id)
        )
    if metadata:
        statement = statement.where(_column_contains(metadata))
    if without_metadata:
        statement = statement.where(
            or_(Job.metadata_.is_(None), Job.metadata_ == func.jsonb_build_object())
        )
    statement = statement.order_by(Job.created_at.desc(), Job.id.desc()).limit(limit)
    return session.scalars(statement).all()


def _column_contains(pairs: dict[str, str]) -> ColumnElement[bool]:
    return Job.metadata_.cast(JSONB).contains(pairs)


def newest_steps(session: Session, job_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the data of each job's newest metrics that say how many steps there are (one look-up per job)."""
    if not job_ids:
        return {}
    jobs = select(Job.id).where(Job.id.in_(job_ids)).subquery()
    newest = (
        select(Event.data)
        .where(
            Event.job_id == jobs.c.id,
            Event.type == "metrics",
            Event.data.has_key("total_steps"),
        )
        .order_by(Event.seq.desc())
        .limit(1)
        .lateral()
    )
    rows = session.execute(
        select(jobs.c.id, newest.c.data).join(newest, newest.c.data.is_not(None))
    )
    return {row.id: row.data for row in rows}


def update_desired(session: Session, job_id: str, desired: str) -> None:
    """Write the wish that the job's worker will fulfil; the caller holds the row."""
    session.execute(update(Job).where(Job.id == job_id).values(desired=desired))


def update_status(
    session: Session,
    job_id: str,
    *,
    source: Sequence[str],
    attempt_no: int | None,
    values: dict[str, Any],
) -> Job | None:
    """Write `values` if the job still stands in one of `source` (and under the fence); None: it does not."""
    statement = update(Job).where(Job.id == job_id, Job.status.in_(source))
    if attempt_no is not None:
        statement = statement.where(Job.attempt_no == attempt_no, Job.lease_owner.is_not(None))
    return session.scalars(
        statement.values(**values).returning(Job), execution_options={"populate_existing": True}
    ).one_or_none()


def insert_outbox(
    session: Session, *, project_id: str, job_id: str, type_: str, created_at: datetime
) -> None:
    """Note that the outside must hear of this."""
    session.execute(
        insert(Outbox).values(
            project_id=project_id, job_id=job_id, type=type_, created_at=created_at
        )
    )
