"""The loops of the API's process: take back ended leases, tell who waits for a larger GPU, ring again for what waits.

Not in Celery's beat, since recovery must not depend on the broker. Any number of API processes may run them: each
pass takes a lock in the database first, and skips its turn when another has it.
"""

from collections.abc import Callable

from sqlalchemy.orm import Session, sessionmaker

from service.db import transaction
from service.passes import repeat
from service.queue import line_repository, repository
from service.queue.broker import KINDS, Kind
from service.queue.kick import Doorbell
from service.queue.reap import reap
from service.queue.unfit import tell_unfit
from service.settings import Settings


def start(settings: Settings, sessions: sessionmaker[Session]) -> Callable[[], None]:
    """Start the loops in a thread of their own and return the function that stops them and waits for it.

    Raises:
        RedisUrlMissing: no broker is configured.
    """
    doorbell = Doorbell(settings)
    stop_passes = repeat(
        lambda: run_once(settings, sessions, doorbell),
        name="background_pass",
        every_s=settings.reap_s,
    )

    def stop() -> None:
        stop_passes()
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
        waiting: set[Kind] = {kind for kind in KINDS if line_repository.is_waiting(session, kind)}
    for kind in waiting:
        doorbell.kick(kind)
    return waiting
