"""SQL of events."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

from service.tables import Event, Job


def take_seq(session: Session, job_id: str, count: int) -> int:
    """Take `count` numbers of a job's story and return the first.

    The job's row stays locked until the transaction ends, so numbers become visible in their order: a reader who has
    seen n will never find an n - 1 later.
    """
    statement = update(Job).where(Job.id == job_id).values(seq=Job.seq + count).returning(Job.seq)
    return session.execute(statement).scalar_one() - count + 1


def insert_all(session: Session, rows: Sequence[dict[str, Any]]) -> None:
    """Insert event rows (the keys are `Event`'s columns)."""
    session.execute(insert(Event), list(rows))


def after(session: Session, project_id: str, job_id: str, seq: int, limit: int) -> Sequence[Event]:
    """Return up to `limit` events of a job after number `seq`, oldest first."""
    statement = (
        select(Event)
        .where(Event.project_id == project_id, Event.job_id == job_id, Event.seq > seq)
        .order_by(Event.seq)
        .limit(limit)
    )
    return session.scalars(statement).all()
