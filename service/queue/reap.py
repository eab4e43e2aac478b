"""Taking back what workers hold whose lease has ended.

The end is the database's, with a margin, and with an amnesty after its own restart; a worker that was merely slow finds
itself fenced.
"""

from sqlalchemy.orm import Session

from service.queue import repository
from service.queue.broker import Kind
from service.queue.finish import take_back
from service.settings import Settings

_AT_ONCE = 100


def margin_s(lease_s: float) -> float:
    """Return how long after its end a lease is left alone: a quarter of it, 30 s for the default lease."""
    return lease_s / 4


def reap(session: Session, settings: Settings) -> set[Kind]:
    """Requeue, or after `max_attempts` losses fail, up to 100 jobs with an ended lease; return what waits now."""
    kinds: set[Kind] = set()
    ended = repository.lock_ended_leases(
        session, settings.lease_s, margin_s(settings.lease_s), _AT_ONCE
    )
    for job in ended:
        kind = take_back(
            session,
            job,
            lost=True,
            reason="its worker has not been heard of since its lease ended",
            max_attempts=settings.max_attempts,
        )
        if kind is not None:
            kinds.add(kind)
    return kinds
