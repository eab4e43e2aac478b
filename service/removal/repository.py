"""SQL of the right to remove blobs: PostgreSQL's advisory locks, which have no owner but a number."""

from sqlalchemy import Connection, func, select
from sqlalchemy.orm import Session

_LOCK = 0x6E6962_03


def may_remove(session: Session) -> bool:
    """Take the right to remove blobs until the transaction ends, as any number may; False: a dump is being made."""
    return session.scalar(select(func.pg_try_advisory_xact_lock_shared(_LOCK))) is True


def hold_off_removal(connection: Connection) -> None:
    """Wait until nobody removes blobs, and keep it so until the connection closes."""
    connection.execute(select(func.pg_advisory_lock(_LOCK)))
