"""Removing the bytes of deleted and expired files, once no live job needs them, and what cut off uploads left.

Not in the request that deletes: a job that is being created may have just looked at the file. Any number of API
processes may do this at once; each skips the rows another one has locked.
"""

from collections.abc import Callable
from datetime import timedelta

from sqlalchemy.orm import Session, sessionmaker

from service import clock
from service.db import transaction
from service.files import repository
from service.logging import get_logger
from service.passes import repeat
from service.removal.repository import may_remove
from service.storage import Storage

log = get_logger(__name__)

EVERY_S = 30.0
GRACE = timedelta(seconds=60)
"""Longer than creating a job takes."""
_BATCH = 100
_LEFT_S = 600.0
"""How old what a killed process left of an upload gets; long after a new one has been locked by its writer."""


def start(sessions: sessionmaker[Session], storage: Storage) -> Callable[[], None]:
    """Purge every half minute in a thread of its own; the function returned stops it and waits for it."""
    return repeat(lambda: run_once(sessions, storage), name="purge", every_s=EVERY_S)


def run_once(sessions: sessionmaker[Session], storage: Storage, *, grace: timedelta = GRACE) -> int:
    """Hide what has expired, remove the bytes of what has been hidden for `grace`, and return how many blobs went.

    What cut off uploads left is removed, too.
    """
    storage.sweep(older_than_s=_LEFT_S)
    with transaction(sessions) as session:
        repository.hide_expired(session)
    removed = 0
    while batch := _remove_batch(sessions, storage, grace):
        removed += batch
    return removed


def _remove_batch(sessions: sessionmaker[Session], storage: Storage, grace: timedelta) -> int:
    with transaction(sessions) as session:
        if not may_remove(session):
            return 0
        files = repository.lock_purgeable(session, hidden_before=clock.now() - grace, limit=_BATCH)
        for file in files:
            storage.delete(file.blob_key)  # a rollback repeats it, which is harmless
            file.blob_key = repository.BLOB_GONE
        return len(files)
