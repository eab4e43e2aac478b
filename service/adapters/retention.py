"""Removing adapters that nothing offers: what lost, failed and cancelled attempts published, and checkpoints past those that are kept.

An adapter is referenced by a checkpoint's row, or as what a succeeded job offers; such a one never goes. Bytes go before the
row, in one transaction: a process that is killed in between leaves a row which the next pass finds again, and never bytes
that nobody knows of.
"""

from collections.abc import Callable
from datetime import datetime, timedelta

from sqlalchemy.orm import Session, sessionmaker

from service import clock
from service.adapters import repository
from service.db import transaction
from service.logging import get_logger
from service.passes import repeat
from service.removal.repository import may_remove
from service.storage import Storage

log = get_logger(__name__)

EVERY_S = 600.0
GRACE = timedelta(hours=1)
"""After a job's end; a download that began before it is over by then."""
_BATCH = 20


def start(
    sessions: sessionmaker[Session], storage: Storage, *, keep_checkpoints: int | None
) -> Callable[[], None]:
    """Look every ten minutes in a thread of its own; the function returned stops it and waits for it."""
    return repeat(
        lambda: run_once(sessions, storage, keep_checkpoints=keep_checkpoints),
        name="retention",
        every_s=EVERY_S,
    )


def run_once(
    sessions: sessionmaker[Session],
    storage: Storage,
    *,
    keep_checkpoints: int | None = None,
    grace: timedelta = GRACE,
) -> int:
    """Make one pass over jobs that ended `grace` ago or earlier, and return how many adapters went.

    Args:
        sessions: of the database.
        storage: where the adapters' files are.
        keep_checkpoints: of each job the last so many stay, and that of the adapter it offers; None: all of them.
        grace: how long after its end a job is left alone.

    Raises:
        Unavailable: the storage does not answer; what went before has gone.
    """
    ended_before = clock.now() - grace
    if keep_checkpoints is not None:
        with transaction(sessions) as session:
            repository.delete_checkpoints_past(session, keep_checkpoints, ended_before=ended_before)
    removed = 0
    while batch := _remove_batch(sessions, storage, ended_before):
        removed += batch
    if removed:
        log.info("adapters_expired", adapters=removed)
    return removed


def _remove_batch(sessions: sessionmaker[Session], storage: Storage, ended_before: datetime) -> int:
    with transaction(sessions) as session:
        if not may_remove(session):
            return 0
        adapters = repository.lock_unreferenced(session, ended_before=ended_before, limit=_BATCH)
        for adapter in adapters:
            for file in adapter.files:
                storage.delete(file["blob_key"])  # a rollback repeats it, which is harmless
            session.delete(adapter)
        return len(adapters)
