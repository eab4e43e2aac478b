"""Keeps the lease of one attempt, and reads what is wished of its job.

In a thread of its own with connections of its own: the supervisor must see the lease run out even while a
call to the database hangs. Time is CLOCK_BOOTTIME, which a suspended machine's sleep counts into.
"""

import threading
import time

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from service.db import transaction
from service.logging import get_logger
from service.queue import lease
from service.queue.fence import Fence, Fenced
from worker.folder import AttemptFolder

log = get_logger(__name__)

_LONGEST_POLL_S = 0.7
"""A wish to cancel is seen this late at most."""
_LONGEST_MARGIN_S = 20.0


def boottime() -> float:
    """Return seconds of CLOCK_BOOTTIME."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LeaseKeeper:
    """Renews from `start` until `stop`, or until the job is another attempt's."""

    def __init__(
        self,
        sessions: sessionmaker[Session],
        fence: Fence,
        folder: AttemptFolder,
        *,
        lease_s: float,
        renew_s: float,
        held_since: float,
    ) -> None:
        """`held_since`: boottime before the lease was granted."""
        self._sessions = sessions
        self._fence = fence
        self._folder = folder
        self._lease_s = lease_s
        self._renew_s = renew_s
        self._until = held_since + lease_s
        self._margin_s = min(_LONGEST_MARGIN_S, lease_s / 6)
        self._desired = "run"
        self._fenced = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"lease-{fence.job_id}", daemon=True)

    @property
    def desired(self) -> str:
        """What was last read of the job's wish: run, pause, preempt or cancel."""
        return self._desired

    @property
    def is_fenced(self) -> bool:
        """Whether the database said that the job is no longer this attempt's."""
        return self._fenced

    @property
    def is_safe(self) -> bool:
        """Whether nobody else can have been given the job yet; near the lease's end this is no longer sure."""
        return boottime() < self._until - self._margin_s

    def start(self) -> None:
        """Begin; the child's deadline is written at once."""
        self._folder.write_deadline(self._until)
        self._thread.start()

    def stop(self) -> None:
        """End. A renewal that hangs is left to itself: the fence makes it harmless."""
        self._stopping.set()
        if self._thread.is_alive():  # one that was never started has ended, too
            self._thread.join(timeout=1)

    def _run(self) -> None:
        structlog.contextvars.bind_contextvars(
            job_id=self._fence.job_id, attempt_no=self._fence.attempt_no
        )
        poll_s = min(_LONGEST_POLL_S, self._renew_s)
        next_renewal = boottime() + self._renew_s
        while not self._stopping.wait(poll_s):
            due = boottime() >= next_renewal
            try:
                self._ask(renew=due)
            except Fenced:
                self._fenced = True
                return
            except SQLAlchemyError as error:
                log.warning("lease_not_renewed", job_id=self._fence.job_id, reason=str(error)[:200])
                continue
            except (
                OSError
            ) as error:  # the attempt's disk is full: the child keeps its earlier deadline
                log.warning("deadline_not_written", job_id=self._fence.job_id, reason=str(error))
            except Exception:
                # The thread's edge: without it the child would stay frozen for good.
                log.exception("lease_not_renewed", job_id=self._fence.job_id)
                continue
            if due:
                next_renewal = boottime() + self._renew_s

    def _ask(self, *, renew: bool) -> None:
        with transaction(self._sessions) as session:
            if not renew:
                self._desired = lease.read_desired(session, self._fence)
                return
            asked = boottime()
            self._desired = lease.renew(session, self._fence, self._lease_s)
        self._until = asked + self._lease_s
        self._folder.write_deadline(self._until)
