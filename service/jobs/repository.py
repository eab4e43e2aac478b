"""SQL of jobs."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

from service.tables import Job, Outbox


def get(session: Session, project_id: str, job_id: str) -> Job | None:
    """Return the project's job, or None."""
    statement = select(Job).where(Job.project_id == project_id, Job.id == job_id)
    return session.scalars(statement).one_or_none()


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
