"""SQL of keys and projects."""

from datetime import datetime

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service.tables import ApiKey, Project

_FIRST_KEY_LOCK = 0x6E69_6262_6B65_79  # "nibbkey"


def find_by_sha256(session: Session, sha256: str) -> ApiKey | None:
    """Return the key with this hash, revoked or not, or None."""
    return session.scalars(select(ApiKey).where(ApiKey.sha256 == sha256)).one_or_none()


def insert_key(session: Session, key: ApiKey) -> None:
    """Insert a key."""
    session.add(key)
    session.flush()


def touch(session: Session, key_id: str, *, now: datetime, unless_since: datetime) -> None:
    """Set `last_used_at` to `now`, unless it has been set since `unless_since` (requests at once write once)."""
    session.execute(
        update(ApiKey)
        .where(
            ApiKey.id == key_id,
            ApiKey.last_used_at.is_(None) | (ApiKey.last_used_at < unless_since),
        )
        .values(last_used_at=now)
        .execution_options(synchronize_session=False)
    )


def revoke(session: Session, project_id: str, key_id: str, now: datetime) -> bool:
    """Revoke the project's key; False if it has none such, or it is revoked already."""
    statement = (
        update(ApiKey)
        .where(ApiKey.project_id == project_id, ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
        .values(revoked_at=now)
        .returning(ApiKey.id)
    )
    return session.execute(statement).first() is not None


def ensure_project(session: Session, project_id: str, name: str, now: datetime) -> None:
    """Insert a project unless it is there."""
    session.execute(
        insert(Project)
        .values(id=project_id, name=name, created_at=now)
        .on_conflict_do_nothing(index_elements=[Project.id])
    )


def project_exists(session: Session, project_id: str) -> bool:
    """Say whether there is such a project."""
    return session.get(Project, project_id) is not None


def has_live_keys(session: Session) -> bool:
    """Say whether any key, of any project, opens the door."""
    statement = select(ApiKey.id).where(ApiKey.revoked_at.is_(None)).limit(1)
    return session.execute(statement).first() is not None


def lock_first_start(session: Session) -> None:
    """Wait until no other process makes the first key; released when the transaction ends."""
    session.execute(select(func.pg_advisory_xact_lock(_FIRST_KEY_LOCK)))
