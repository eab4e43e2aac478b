"""SQL of adapters and checkpoints."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, delete, func, select, tuple_
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session, aliased

from service.tables import Adapter, Checkpoint, Job


def get(session: Session, project_id: str, adapter_id: str) -> Adapter | None:
    """Return the project's adapter, or None."""
    statement = select(Adapter).where(Adapter.project_id == project_id, Adapter.id == adapter_id)
    return session.scalars(statement).one_or_none()


def of_attempt(session: Session, job_id: str, attempt_no: int, step_number: int) -> Adapter | None:
    """Return what an attempt published at a step, or None."""
    statement = select(Adapter).where(
        Adapter.job_id == job_id,
        Adapter.attempt_no == attempt_no,
        Adapter.step_number == step_number,
    )
    return session.scalars(statement).one_or_none()


def newest(
    session: Session, project_id: str, job_id: str, *, step_number: int | None
) -> Adapter | None:
    """Return the adapter of a step, None for the last one, of the job's newest attempt that has it."""
    statement = select(Adapter).where(Adapter.project_id == project_id, Adapter.job_id == job_id)
    if step_number is not None:
        statement = statement.where(Adapter.step_number == step_number)
    statement = statement.order_by(Adapter.attempt_no.desc(), Adapter.step_number.desc()).limit(1)
    return session.scalars(statement).one_or_none()


def insert_once(session: Session, values: dict[str, Any]) -> None:
    """Insert an adapter, unless its attempt has already published that step."""
    session.execute(
        insert(Adapter)
        .values(**values)
        .on_conflict_do_nothing(index_elements=["job_id", "attempt_no", "step_number"])
    )


def save_checkpoint(session: Session, values: dict[str, Any]) -> Checkpoint:
    """Insert a checkpoint; where the job has one of that step, a newer attempt's takes its place under its name."""
    statement = insert(Checkpoint).values(**values)
    new = statement.excluded
    saved = statement.on_conflict_do_update(
        index_elements=["job_id", "step_number"],
        set_={
            "attempt_no": new.attempt_no,
            "metrics": new.metrics,
            "adapter_id": new.adapter_id,
        },
        where=Checkpoint.attempt_no <= new.attempt_no,
    )
    session.execute(saved)
    return session.scalars(
        select(Checkpoint).where(
            Checkpoint.job_id == values["job_id"],
            Checkpoint.step_number == values["step_number"],
        ),
        execution_options={"populate_existing": True},
    ).one()


def get_checkpoint(
    session: Session, project_id: str, job_id: str, checkpoint_id: str
) -> Checkpoint | None:
    """Return a checkpoint of the project's job, or None."""
    statement = select(Checkpoint).where(
        Checkpoint.project_id == project_id,
        Checkpoint.job_id == job_id,
        Checkpoint.id == checkpoint_id,
    )
    return session.scalars(statement).one_or_none()


def page_of_checkpoints(
    session: Session, project_id: str, job_id: str, *, after: str | None, limit: int
) -> Sequence[Checkpoint]:
    """Return up to `limit` checkpoints of a job, latest step first, of earlier steps than that of `after`."""
    statement = select(Checkpoint).where(
        Checkpoint.project_id == project_id, Checkpoint.job_id == job_id
    )
    if after is not None:
        cursor = select(Checkpoint.step_number).where(
            Checkpoint.job_id == job_id, Checkpoint.id == after
        )
        statement = statement.where(Checkpoint.step_number < cursor.scalar_subquery())
    statement = statement.order_by(Checkpoint.step_number.desc()).limit(limit)
    return session.scalars(statement).all()


def lock_unreferenced(session: Session, *, ended_before: datetime, limit: int) -> Sequence[Adapter]:
    """Lock and return adapters of ended jobs that neither a checkpoint nor the job's success offers."""
    statement = (
        select(Adapter)
        .join(Job, Job.id == Adapter.job_id)
        .where(
            Job.finished_at < ended_before,
            ~select(Checkpoint.id).where(Checkpoint.adapter_id == Adapter.id).exists(),
            ~_is_offered(),
        )
        .order_by(Adapter.created_at, Adapter.id)
        .limit(limit)
        .with_for_update(of=Adapter, skip_locked=True)
    )
    return session.scalars(statement).all()


def _is_offered() -> ColumnElement[bool]:
    """Of a succeeded job the adapter that `newest` finds for its `adapter_step`."""
    newer = aliased(Adapter)
    is_newer = tuple_(newer.attempt_no, newer.step_number) > tuple_(
        Adapter.attempt_no, Adapter.step_number
    )
    of_its_step = Job.adapter_step.is_(None) | (newer.step_number == Job.adapter_step)
    there_is_a_newer_one = (
        select(newer.id).where(newer.job_id == Adapter.job_id, of_its_step, is_newer).exists()
    )
    return (
        (Job.status == "succeeded")
        & (Job.adapter_step.is_(None) | (Adapter.step_number == Job.adapter_step))
        & ~there_is_a_newer_one
    )


def delete_checkpoints_past(session: Session, keep: int, *, ended_before: datetime) -> int:
    """Take ended jobs' checkpoints off their lists, but for the last `keep` and that of the adapter which the job offers."""
    place = func.row_number().over(
        partition_by=Checkpoint.job_id, order_by=Checkpoint.step_number.desc()
    )
    is_offered = (Job.status == "succeeded") & (Checkpoint.step_number == Job.adapter_step)
    ranked = (
        select(Checkpoint.id, place.label("place"), func.coalesce(is_offered, False).label("kept"))
        .join(Job, Job.id == Checkpoint.job_id)
        .where(Job.finished_at < ended_before)
        .subquery()
    )
    past = select(ranked.c.id).where(ranked.c.place > keep, ~ranked.c.kept)
    deleted = delete(Checkpoint).where(Checkpoint.id.in_(past)).returning(Checkpoint.id)
    return len(session.scalars(deleted).all())
