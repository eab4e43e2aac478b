"""SQL of the workers: who is there, and what they hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    Row,
    func,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from service.queue.repository import HELD, from_now
from service.tables import Job, Worker

_REMEMBERED_S = 86_400.0


def save_worker(session: Session, worker: dict[str, Any]) -> None:
    """Insert a worker's row, or bring it up to date; `seen_at` is the database's time."""
    now = func.now()
    statement = upsert(Worker).values(**worker, started_at=now, seen_at=now)
    session.execute(
        statement.on_conflict_do_update(
            index_elements=[Worker.id],
            set_={"seen_at": now, "slots": statement.excluded.slots, "stopped_at": None},
        )
    )


def stop_worker(session: Session, worker_id: str) -> None:
    """Note that a worker has ended."""
    session.execute(update(Worker).where(Worker.id == worker_id).values(stopped_at=func.now()))


def worker_was_seen(session: Session, host: str, within_s: float) -> bool:
    """Say whether a worker of this host, not stopped, has been heard of in the last `within_s` seconds."""
    statement = select(Worker.id).where(
        Worker.host == host, Worker.stopped_at.is_(None), Worker.seen_at > from_now(-within_s)
    )
    return session.execute(statement.limit(1)).first() is not None


def workers(session: Session, *, within_s: float, limit: int) -> Sequence[Row[Worker, bool]]:
    """Return the workers that have not stopped and were heard of within a day, and whether within `within_s` seconds."""
    is_heard = (Worker.seen_at > from_now(-within_s)).label("is_heard")
    statement = (
        select(Worker, is_heard)
        .where(Worker.stopped_at.is_(None), Worker.seen_at > from_now(-_REMEMBERED_S))
        .order_by(Worker.started_at, Worker.id)
        .limit(limit)
    )
    return session.execute(statement).all()


@dataclass(frozen=True)
class Held:
    """A job that a worker has."""

    job_id: str
    project_id: str
    worker_id: str
    is_training: bool
    estimated_finish: datetime | None


def held_jobs(session: Session, limit: int) -> Sequence[Held]:
    """Return what workers hold."""
    statement = (
        select(Job.id, Job.project_id, Job.lease_owner, Job.status, Job.estimated_finish)
        .where(Job.status.in_(tuple(HELD.values())), Job.lease_owner.is_not(None))
        .order_by(Job.created_at, Job.id)
        .limit(limit)
    )
    return [
        Held(
            row.id,
            row.project_id,
            row.lease_owner or "",
            row.status == "running",
            row.estimated_finish,
        )
        for row in session.execute(statement)
    ]
