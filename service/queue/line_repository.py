"""SQL of the waiting line: whose turn it is, in which order the others follow, and what fits no GPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from sqlalchemy import (
    BigInteger,
    BindParameter,
    ColumnElement,
    Float,
    Select,
    Subquery,
    bindparam,
    case,
    func,
    select,
    true,
    update,
)
from sqlalchemy.orm import Session, aliased

from service.queue.repository import HELD
from service.tables import Job, Project

_CLAIMS_LOCK = 0x6E6962_01
_HEADS = 3

WAITING = {"validate": "validating_files", "train": "queued"}
"""The status in which each kind of work waits."""
_CLAIMABLE = {"validate": ("run", "pause"), "train": ("run",)}
"""With which wishes each kind of work is begun: a job that is to be paused is validated first."""


def serialise_claims(session: Session) -> None:
    """Let one claim at a time through, until the transaction ends: shares are counted, so they must not race."""
    session.execute(select(func.pg_advisory_xact_lock(_CLAIMS_LOCK)))


def _in_sql(status: str) -> BindParameter[str]:
    """Return the status as a part of the statement: a plan for any status could not use an index over some."""
    return bindparam(None, status, unique=True, literal_execute=True)


def _waiting(kind: str, job: type[Job] = Job) -> Sequence[ColumnElement[bool]]:
    return (
        job.status == _in_sql(WAITING[kind]),
        job.lease_owner.is_(None),
        job.desired.in_(_CLAIMABLE[kind]),
        job.not_before.is_(None) | (job.not_before <= func.now()),
    )


def _held_per_project(kind: str) -> Subquery:
    return (
        select(Job.project_id, func.count().label("n"))
        .where(Job.status == _in_sql(HELD[kind]), Job.lease_owner.is_not(None))
        .group_by(Job.project_id)
        .subquery()
    )


@dataclass(frozen=True)
class Turn:
    """A job whose turn it is, and the number of the attempt that it gets."""

    job_id: str
    attempt_no: int


def next_waiting(session: Session, kind: str, room_bytes: int | None) -> Turn | None:
    """Lock and return the job of `kind` whose turn it is: fair share, then priority, then age; None: none waits.

    Left out are those that are known to need more than `room_bytes`. Only each project's first three are looked at (the
    index has them in their order): the next two are for jobs that somebody has locked.
    """
    statement = _whose_turn(kind, knows_room=room_bytes is not None)
    values = {} if room_bytes is None else {"room_bytes": room_bytes}
    row = session.execute(statement, values).one_or_none()
    return None if row is None else Turn(row.id, row.attempt_no + 1)


@cache
def _whose_turn(kind: str, *, knows_room: bool) -> Select[str, int]:
    """Return the statement, made once: to make it takes longer than to run it, and others wait for the claim's end."""
    need, room = Job.memory_needed_bytes, bindparam("room_bytes", type_=BigInteger)
    fits = [need.is_(None) | (need <= room)] if knows_room else []
    held = _held_per_project(kind)
    head = (
        select(Job.id, Job.priority, Job.created_at)
        .where(Job.project_id == Project.id, *_waiting(kind), *fits)
        .order_by(Job.priority.desc(), Job.created_at, Job.id)
        .limit(_HEADS)
        .lateral()
    )
    share = func.coalesce(held.c.n, 0).cast(Float) / func.greatest(Project.weight, 1)
    taken = aliased(Job)
    return (
        select(taken.id, taken.attempt_no)
        .select_from(Project)
        .join(head, true())
        .join(taken, taken.id == head.c.id)
        .outerjoin(held, held.c.project_id == Project.id)
        .where(*_waiting(kind, taken))  # looked at again once it is locked
        .order_by(share, head.c.priority.desc(), head.c.created_at, head.c.id)
        .limit(1)
        .with_for_update(of=taken, skip_locked=True)
    )


@dataclass(frozen=True)
class InLine:
    """A job that waits for training, and how many are taken before it and with it."""

    job_id: str
    position: int
    memory_needed_bytes: int | None


def line(session: Session, *, first: int, job_ids: Sequence[str]) -> list[InLine]:
    """Return the `first` jobs that wait for training, and these, in the order in which `next_waiting` takes them.

    A project's n-th job is taken when its share has grown by n - 1: projects' jobs interleave as if none ended meanwhile.
    """
    held = _held_per_project("train")
    turn = func.row_number().over(
        partition_by=Job.project_id, order_by=(Job.priority.desc(), Job.created_at, Job.id)
    )
    share = (func.coalesce(held.c.n, 0) + turn - 1).cast(Float) / func.greatest(Project.weight, 1)
    waiting = (
        select(Job.id, Job.memory_needed_bytes, Job.priority, Job.created_at, share.label("share"))
        .join(Project, Project.id == Job.project_id)
        .outerjoin(held, held.c.project_id == Job.project_id)
        .where(*_waiting("train"))
        .subquery()
    )
    order = (waiting.c.share, waiting.c.priority.desc(), waiting.c.created_at, waiting.c.id)
    position = func.row_number().over(order_by=order).label("position")
    placed = select(waiting.c.id, waiting.c.memory_needed_bytes, position).subquery()
    statement = (
        select(placed)
        .where((placed.c.position <= first) | placed.c.id.in_(job_ids))
        .order_by(placed.c.position)
        .limit(first + len(job_ids))
    )
    return [
        InLine(row.id, row.position, row.memory_needed_bytes) for row in session.execute(statement)
    ]


def lock_unfit(session: Session, room_bytes: int, limit: int) -> Sequence[Job]:
    """Lock and return jobs that wait, need more than `room_bytes`, and whose story does not say so yet."""
    statement = (
        select(Job)
        .where(
            *_waiting("train"),
            Job.memory_needed_bytes > room_bytes,
            Job.unfit_told_at.is_(None),
        )
        .order_by(Job.created_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return session.scalars(statement).all()


def note_unfit_told(session: Session, job_id: str) -> None:
    """Note that the job's story says that it fits nowhere; the caller holds the row."""
    session.execute(update(Job).where(Job.id == job_id).values(unfit_told_at=func.now()))


def count_by_status(session: Session, project_id: str) -> dict[bool, dict[str, int]]:
    """Count the live jobs in each status: True: the project's own, False: all others'."""
    is_own = (Job.project_id == project_id).label("is_own")
    statement = (
        select(is_own, Job.status, func.count().label("n"))
        .where(Job.status.in_(("validating_files", "queued", "running", "paused")))
        .group_by(is_own, Job.status)
    )
    counts: dict[bool, dict[str, int]] = {True: {}, False: {}}
    for row in session.execute(statement):
        counts[row.is_own][row.status] = row.n
    return counts


def live_jobs(session: Session, project_id: str, limit: int) -> Sequence[Job]:
    """Return the project's jobs that have not ended: those that run, that wait in their order, are validated, paused."""
    order = case({"running": 0, "queued": 1, "validating_files": 2, "paused": 3}, value=Job.status)
    statement = (
        select(Job)
        .where(
            Job.project_id == project_id,
            Job.status.in_(("validating_files", "queued", "running", "paused")),
        )
        .order_by(order, Job.priority.desc(), Job.created_at, Job.id)
        .limit(limit)
    )
    return session.scalars(statement).all()


def is_waiting(session: Session, kind: str) -> bool:
    """Tell whether a job of `kind` waits for a worker."""
    return (
        session.scalar(select(true()).where(select(Job.id).where(*_waiting(kind)).exists())) is True
    )
