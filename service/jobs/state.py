"""The state machine, and the only writer of `jobs.status`.

    validating_files ──▶ queued ──▶ running ──▶ succeeded
        │    │            ▲ │ ▲       │ │ │
        │    │            │ │ └───────┘ │ ├────▶ failed
        │    │            │ ▼           │ │
        │    └──────────▶ paused ◀──────┘ │
        ▼                   ▼             ▼
    failed, cancelled   cancelled     cancelled     (and queued ──▶ cancelled)

A move is a conditional UPDATE, an event, and for an end an outbox row, all in the caller's transaction. A worker's
move carries its `attempt_no`: when the job has gone to another attempt, nothing is written and `Fenced` is raised.
Who makes which move is in docs/architecture.md.
"""

from typing import Any, Literal

from sqlalchemy.orm import Session

from service import clock
from service.events.actions import NewEvent, append
from service.events.content import storable
from service.jobs import repository
from service.tables import Job

Status = Literal[
    "validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"
]

SOURCES: dict[Status, tuple[Status, ...]] = {
    "queued": ("validating_files", "running", "paused"),
    "running": ("queued",),
    "paused": ("validating_files", "queued", "running"),
    "succeeded": ("running",),
    "failed": ("validating_files", "running"),
    "cancelled": ("validating_files", "queued", "running", "paused"),
}
"""From where each status can be reached."""

TERMINAL: frozenset[Status] = frozenset({"succeeded", "failed", "cancelled"})


_TOLD_BY_RUNS = ("error", "dataset_report")
"""Columns that may quote a user's file or a child's log, and so hold what PostgreSQL cannot."""


class Fenced(Exception):
    """The job is no longer this attempt's, or no longer where the move starts: stop, write nothing."""


def move(
    session: Session,
    job_id: str,
    to: Status,
    event: NewEvent,
    *,
    attempt_no: int | None = None,
    source: tuple[Status, ...] | None = None,
    release: bool = True,
    next_attempt_no: int | None = None,
    **values: Any,  # noqa: ANN401  (each column's own type)
) -> Job:
    """Move a job to status `to` and tell it.

    Args:
        session: the transaction that everything belongs to.
        job_id: the job.
        to: the status to reach.
        event: what its story says of it.
        attempt_no: the worker's fence; None for moves that no worker makes (the API, the reaper, the claim).
        source: narrower than `SOURCES[to]`, when the caller knows.
        release: give up the lease; False for the claim, which sets it in `values`.
        next_attempt_no: the attempt that begins with this move; the claim's alone.
        values: further columns of `Job` written in the same UPDATE.

    Raises:
        Fenced: the job does not stand there, or belongs to another attempt. Nothing was written.
    """
    for name in _TOLD_BY_RUNS:
        values |= {name: storable(values[name])} if name in values else {}
    values |= {"status": to, "paused_at": clock.now() if to == "paused" else None}
    if release:
        values |= {"lease_owner": None, "lease_until": None}
    if next_attempt_no is not None:
        values["attempt_no"] = next_attempt_no
    if to in TERMINAL:
        values["finished_at"] = clock.now()
    job = repository.update_status(
        session, job_id, source=source or SOURCES[to], attempt_no=attempt_no, values=values
    )
    if job is None:
        raise Fenced(f"job {job_id} cannot move to {to} (attempt {attempt_no})")
    append(session, job.project_id, job.id, event)
    if to in TERMINAL:
        repository.insert_outbox(
            session,
            project_id=job.project_id,
            job_id=job.id,
            type_=f"fine_tuning.job.{to}",
            created_at=clock.now(),
        )
    return job
