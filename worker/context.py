"""What every part of a worker needs: where things are, and who this worker is."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TypeVar

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, sessionmaker

from service.db import transaction
from service.models.catalog import Catalog
from service.queue.kick import Doorbell
from service.settings import Settings
from service.storage import Storage
from worker.folder import AttemptFolder
from worker.metrics import WorkerMetrics

T = TypeVar("T")


@dataclass(frozen=True)
class WorkerContext:
    """One per worker process; everything in it may be used by several threads."""

    settings: Settings
    sessions: sessionmaker[Session]
    lease_sessions: sessionmaker[Session]
    """Of an engine of its own: nothing that is slow elsewhere may delay a renewal."""
    storage: Storage
    catalog: Catalog
    doorbell: Doorbell
    worker_id: str
    host: str
    metrics: WorkerMetrics = field(default_factory=WorkerMetrics)

    def transaction(self) -> AbstractContextManager[Session]:
        """One transaction over the worker's own connections."""
        return transaction(self.sessions)

    def folder(self, job_id: str, attempt_no: int) -> AttemptFolder:
        """Return the folder of an attempt."""
        return AttemptFolder(self.settings.attempts_dir / job_id / str(attempt_no))


class GivenUp(Exception):
    """The database did not answer as long as there was time to wait for it."""


_PASSING_CLASSES = ("08", "40", "53")
"""Of SQLSTATEs: the connection broke, another transaction was in the way, the server is short of something."""
_PASSING = ("25006", "55P03", "57014", "57P01", "57P02", "57P03", "57P05")
"""A standby that becomes the primary, a lock or a statement that took too long, a server that stops or starts."""
_TOO_LONG_A_MESSAGE = "08P01"


def is_outage(error: DBAPIError | PoolTimeout) -> bool:
    """Tell whether the database is away, which passes, from a statement that it refuses, which does not.

    The type of the error does not tell: a value over one of PostgreSQL's limits is an OperationalError, too.
    """
    if isinstance(error, PoolTimeout):  # every connection waits for a server that hangs
        return True
    sqlstate = getattr(error.orig, "sqlstate", None)
    if isinstance(sqlstate, str):
        passes = sqlstate.startswith(_PASSING_CLASSES) or sqlstate in _PASSING
        return passes and sqlstate != _TOO_LONG_A_MESSAGE
    # The server did not say anything: the connection broke, or never came to be.
    return error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)


def outlast(act: Callable[[], T], *, wait: Callable[[float], bool], longest_s: float = 5.0) -> T:
    """Call `act` until the database answers.

    Args:
        act: one whole transaction; it must bear being repeated after a commit whose answer was lost.
        wait: sleeps so many seconds; True: there is no more time.
        longest_s: the longest pause between two tries.

    Raises:
        GivenUp: `wait` said so.
    """
    pause_s = 0.2
    while True:
        try:
            return act()
        except (DBAPIError, PoolTimeout) as error:
            if not is_outage(error):
                raise
            if wait(pause_s):
                raise GivenUp(str(error)) from error
            pause_s = min(longest_s, pause_s * 2)
