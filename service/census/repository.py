"""SQL of the census: counts and ages over all projects, by the database's own clock."""

from datetime import timedelta
from typing import Any, cast

from sqlalchemy import ColumnElement, Integer, case, func, select, true
from sqlalchemy.orm import Session

from service.tables import Attempt, Event, Job, Worker

_WAITS_IN = {"validate": "validating_files", "train": "queued"}
_LIVE = ("validating_files", "queued", "running", "paused")


def _age_s(since: Any) -> ColumnElement[Any]:  # noqa: ANN401  (a column or an aggregate)
    """Seconds from `since` to now; a worker's clock that is ahead makes it no less than 0."""
    return func.greatest(0, func.extract("epoch", func.now() - since))


def live_jobs(session: Session) -> dict[str, tuple[int, float]]:
    """Return how many jobs are in each live status, and for how many seconds the oldest has been so.

    A job that nobody works on has been so since the last line of its story, or since it was paused.
    """
    since = case(
        (Job.status == "paused", Job.paused_at),
        (Job.lease_owner.is_not(None), Attempt.started_at),
        else_=func.coalesce(Event.created_at, Job.created_at),
    )
    statement = (
        select(Job.status, func.count().label("n"), _age_s(func.min(since)).label("age_s"))
        .outerjoin(Event, (Event.job_id == Job.id) & (Event.seq == Job.seq))
        .outerjoin(Attempt, (Attempt.job_id == Job.id) & Attempt.ended_at.is_(None))
        .where(Job.status.in_(_LIVE))
        .group_by(Job.status)
    )
    return {row.status: (row.n, float(row.age_s or 0)) for row in session.execute(statement)}


def ended_leases(session: Session, *, longer_than_s: float) -> int:
    """Count the leases that ended more than so many seconds ago and were not taken back."""
    statement = select(func.count()).where(
        Job.lease_owner.is_not(None),
        Job.lease_until < func.now() - timedelta(seconds=longer_than_s),
    )
    return session.scalar(statement) or 0


def attempts(session: Session) -> dict[tuple[str, str], int]:
    """Count all attempts by kind and outcome; one that has not ended has the outcome `running`."""
    outcome = func.coalesce(Attempt.outcome, "running")
    statement = select(Attempt.kind, outcome.label("outcome"), func.count().label("n")).group_by(
        Attempt.kind, outcome
    )
    return {(row.kind, row.outcome): row.n for row in session.execute(statement)}


def waiting(session: Session, kind: str, *, longer_than_s: float) -> tuple[int, int]:
    """Count the jobs that have waited for a worker for so long: those that would fit one, and those told that none fits."""
    since = func.coalesce(Event.created_at, Job.created_at)
    statement = (
        select(
            func.count().filter(Job.unfit_told_at.is_(None)).label("fit"),
            func.count(Job.unfit_told_at).label("unfit"),
        )
        .select_from(Job)
        .outerjoin(Event, (Event.job_id == Job.id) & (Event.seq == Job.seq))
        .where(
            Job.status == _WAITS_IN[kind],
            Job.lease_owner.is_(None),
            Job.not_before.is_(None) | (Job.not_before <= func.now()),
            _age_s(since) > longer_than_s,
        )
    )
    row = session.execute(statement).one()
    return row.fit, row.unfit


def slots(session: Session, kind: str, *, within_s: float) -> tuple[int, int]:
    """Return how many slots of this kind the workers have that were heard of just now, and how many of them hold a job."""
    heard = _heard(within_s)
    total = session.scalar(
        select(func.coalesce(func.sum(Worker.slots[kind].astext.cast(Integer)), 0)).where(heard)
    )
    held = session.scalar(
        select(func.count())
        .select_from(Job)
        .join(Worker, Worker.id == Job.lease_owner)
        .where(heard, Job.status == ("running" if kind == "train" else "validating_files"))
    )
    return int(total or 0), held or 0


def workers(session: Session, *, within_s: float, limit: int = 1_000) -> list[Worker]:
    """Return the workers that have not stopped and were heard of within so many seconds, oldest first."""
    statement = (
        select(Worker).where(_heard(within_s)).order_by(Worker.started_at, Worker.id).limit(limit)
    )
    return list(session.scalars(statement))


def silent_workers(session: Session, *, within_s: float) -> int:
    """Count the workers that never said goodbye and were not heard of within so many seconds, but were within a day."""
    statement = select(func.count()).where(
        Worker.stopped_at.is_(None),
        Worker.seen_at <= func.now() - timedelta(seconds=within_s),
        Worker.seen_at > func.now() - timedelta(days=1),
    )
    return session.scalar(statement) or 0


def database_time_s(session: Session) -> float:
    """Return the database's clock, in seconds since 1970."""
    return float(cast("Any", session.scalar(select(func.extract("epoch", func.clock_timestamp())))))


def server_version(session: Session) -> int:
    """Return PostgreSQL's number of its version: 160004 is 16.4."""
    return int(session.scalar(select(func.current_setting("server_version_num"))) or 0)


def answers(session: Session) -> bool:
    """Ask the least that can be asked."""
    return session.scalar(select(true())) is True


def _heard(within_s: float) -> ColumnElement[bool]:
    return Worker.stopped_at.is_(None) & (Worker.seen_at > func.now() - timedelta(seconds=within_s))
