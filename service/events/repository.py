"""SQL of events."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import func, insert, select, update
from sqlalchemy.orm import Session

from service.tables import Event, Job

CHANNEL = "nibble_events"
"""PostgreSQL's NOTIFY channel on which a job's id says that its story went on."""


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


def notify(session: Session, job_id: str) -> None:
    """Tell whoever listens on `CHANNEL`, when this transaction commits and not before."""
    session.execute(select(func.pg_notify(CHANNEL, job_id)))


def page(
    session: Session, project_id: str, job_id: str, *, after: str | None, limit: int
) -> Sequence[Event]:
    """Return up to `limit` events of a job, newest first, that came before the event `after`."""
    statement = select(Event).where(Event.project_id == project_id, Event.job_id == job_id)
    if after is not None:
        cursor = select(Event.seq).where(Event.job_id == job_id, Event.id == after)
        statement = statement.where(Event.seq < cursor.scalar_subquery())  # no such event: NULL
    return session.scalars(statement.order_by(Event.seq.desc()).limit(limit)).all()


def metrics_after(
    session: Session, project_id: str, job_id: str, seq: int, limit: int
) -> Sequence[Event]:
    """Return up to `limit` metrics events of a job after number `seq`, oldest first."""
    statement = (
        select(Event)
        .where(
            Event.project_id == project_id,
            Event.job_id == job_id,
            Event.seq > seq,
            Event.type == "metrics",
        )
        .order_by(Event.seq)
        .limit(limit)
    )
    return session.scalars(statement).all()
