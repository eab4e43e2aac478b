"""SQL of the queue: leases, attempts, workers. Every end of a lease is computed by the database's own clock."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    BindParameter,
    ColumnElement,
    Float,
    Row,
    Select,
    Subquery,
    bindparam,
    case,
    func,
    insert,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session, aliased

from service.tables import Attempt, Event, File, Job, Project, Worker

_REMEMBERED_S = 86_400.0
_CLAIMS_LOCK = 0x6E6962_01
_LOOPS_LOCK = 0x6E6962_02

WAITING = {"validate": "validating_files", "train": "queued"}
"""The status in which each kind of work waits."""
HELD = {"validate": "validating_files", "train": "running"}
"""The status in which each kind of work is held."""
_CLAIMABLE = {"validate": ("run", "pause"), "train": ("run",)}
"""With which wishes each kind of work is begun: a job that is to be paused is validated first."""


def serialise_claims(session: Session) -> None:
    """Let one claim at a time through, until the transaction ends: shares are counted, so they must not race."""
    session.execute(select(func.pg_advisory_xact_lock(_CLAIMS_LOCK)))


def try_loops_lock(session: Session) -> bool:
    """Take the right to run the background pass, until the transaction ends; False: another process has it."""
    return bool(session.scalar(select(func.pg_try_advisory_xact_lock(_LOOPS_LOCK))))


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


_HEADS = 3


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


def _from_now(seconds: float) -> ColumnElement[Any]:
    return func.now() + timedelta(seconds=seconds)


def new_lease(worker_id: str, lease_s: float) -> dict[str, Any]:
    """Return what is written into a job's row for a worker's lease from now on."""
    return {"lease_owner": worker_id, "lease_until": _from_now(lease_s)}


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
        .values(lease_until=_from_now(lease_s))
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
        Worker.host == host, Worker.stopped_at.is_(None), Worker.seen_at > _from_now(-within_s)
    )
    return session.execute(statement.limit(1)).first() is not None


def workers(session: Session, *, within_s: float, limit: int) -> Sequence[Row[Worker, bool]]:
    """Return the workers that have not stopped and were heard of within a day, and whether within `within_s` seconds."""
    is_heard = (Worker.seen_at > _from_now(-within_s)).label("is_heard")
    statement = (
        select(Worker, is_heard)
        .where(Worker.stopped_at.is_(None), Worker.seen_at > _from_now(-_REMEMBERED_S))
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
