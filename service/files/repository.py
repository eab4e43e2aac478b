"""SQL of files. A row is hidden, never removed, by a delete; `blob_key` is emptied when its bytes are gone."""

from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from sqlalchemy import ColumnElement, exists, func, or_, select, tuple_, update
from sqlalchemy.orm import Session

from service.tables import File, Job

_LIVE = ("validating_files", "queued", "running", "paused")
BLOB_GONE = ""


def _visible() -> Sequence[ColumnElement[bool]]:
    return File.deleted_at.is_(None), or_(File.expires_at.is_(None), File.expires_at > func.now())


def get(session: Session, project_id: str, file_id: str) -> File | None:
    """Return the project's file, or None; deleted and expired ones are not there."""
    statement = select(File).where(File.project_id == project_id, File.id == file_id, *_visible())
    return session.scalars(statement).one_or_none()


def insert(session: Session, file: File) -> None:
    """Insert a file."""
    session.add(file)
    session.flush()


def has_row(session: Session, project_id: str, file_id: str) -> bool:
    """Say whether the project has a file of this id, visible or not."""
    statement = select(File.id).where(File.project_id == project_id, File.id == file_id)
    return session.execute(statement).first() is not None


def stored_bytes(session: Session, project_id: str) -> int:
    """Return how many bytes the project's files have together; deleted and expired ones do not count."""
    statement = select(func.coalesce(func.sum(File.bytes), 0)).where(
        File.project_id == project_id, *_visible()
    )
    return int(session.scalars(statement).one())


def lock_storing(session: Session, project_id: str) -> None:
    """Let one upload of a project be entered at a time, until the transaction ends."""
    name = f"files/{project_id}"  # not the id alone, which is the lock of the project's jobs
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))


def page(
    session: Session,
    project_id: str,
    *,
    after: str | None,
    limit: int,
    order: Literal["asc", "desc"],
    purpose: str | None,
) -> Sequence[File]:
    """Return up to `limit` of the project's files behind the file `after`, by time of creation.

    `after` may have been deleted since its page was read; one that never was there has nothing behind it.
    """
    statement = select(File).where(File.project_id == project_id, *_visible())
    if purpose is not None:
        statement = statement.where(File.purpose == purpose)
    place = tuple_(File.created_at, File.id)
    if after is not None:
        cursor = (
            select(File.created_at, File.id)
            .where(File.project_id == project_id, File.id == after)
            .scalar_subquery()
        )
        statement = statement.where(place > cursor if order == "asc" else place < cursor)
    ordered = (
        (File.created_at.asc(), File.id.asc())
        if order == "asc"
        else (File.created_at.desc(), File.id.desc())
    )
    return session.scalars(statement.order_by(*ordered).limit(limit)).all()


def hide(session: Session, project_id: str, file_id: str, now: datetime) -> bool:
    """Hide the project's file; False if it is not there."""
    statement = (
        update(File)
        .where(File.project_id == project_id, File.id == file_id, *_visible())
        .values(deleted_at=now)
        .returning(File.id)
        .execution_options(synchronize_session=False)
    )
    return session.execute(statement).first() is not None


def hide_expired(session: Session) -> int:
    """Hide every project's files whose time is over, and return how many those were."""
    statement = (
        update(File)
        .where(File.expires_at <= func.now(), File.deleted_at.is_(None))
        .values(deleted_at=func.now())
        .returning(File.id)
        .execution_options(synchronize_session=False)
    )
    return len(session.execute(statement).all())


def lock_purgeable(session: Session, *, hidden_before: datetime, limit: int) -> Sequence[File]:
    """Lock and return files, of any project, whose bytes nobody needs: long enough hidden, no live job uses them."""
    is_needed = exists().where(
        Job.status.in_(_LIVE), or_(Job.training_file == File.id, Job.validation_file == File.id)
    )
    statement = (
        select(File)
        .where(File.deleted_at < hidden_before, File.blob_key != BLOB_GONE, ~is_needed)
        .order_by(File.deleted_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return session.scalars(statement).all()
