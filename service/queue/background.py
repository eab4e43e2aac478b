"""The loops of the API's process: take back ended leases, tell who waits for a larger GPU, ring again for what waits.

Not in Celery's beat, since recovery must not depend on the broker. Any number of API processes may run them: each
pass takes a lock in the database first, and skips its turn when another has it.
"""

import logging
import threading
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from service.db import transaction
from service.queue import repository
from service.queue.broker import KINDS, Kind
from service.queue.kick import Doorbell
from service.queue.reap import reap
from service.queue.unfit import tell_unfit
from service.settings import Settings

_log = logging.getLogger(__name__)


def start(settings: Settings, sessions: sessionmaker[Session]) -> Callable[[], None]:
    """Start the loops in a thread of their own and return the function that stops them and waits for it.

    Raises:
        RedisUrlMissing: no broker is configured.
    """
    stopping = threading.Event()
    doorbell = Doorbell(settings)

    def loop() -> None:
        while not stopping.wait(settings.reap_s):
            try:
                run_once(settings, sessions, doorbell)
            except SQLAlchemyError as error:
                # The database is away: every pass starts afresh, so the next one makes up for this.
                _log.warning("background_pass_failed", extra={"reason": str(error)})
            except Exception:  # noqa: BLE001  (a thread's edge: recovery must go on)
                _log.exception("background_pass_failed")

    thread = threading.Thread(target=loop, name="background", daemon=True)
    thread.start()

    def stop() -> None:
        stopping.set()
        thread.join(timeout=10)
        doorbell.close()

    return stop


def run_once(
    settings: Settings, sessions: sessionmaker[Session], doorbell: Doorbell
) -> set[Kind] | None:
    """Make one pass and return the kinds that were rung for; None: another process is at it."""
    with transaction(sessions) as session:
        if not repository.try_loops_lock(session):
            return None
        reap(session, settings)
    with transaction(sessions) as session:
        tell_unfit(session, lease_s=settings.lease_s)
    with transaction(sessions) as session:
        waiting: set[Kind] = {kind for kind in KINDS if repository.is_waiting(session, kind)}
    for kind in waiting:
        doorbell.kick(kind)
    return waiting
