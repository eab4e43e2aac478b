"""Keeping a lease, and giving up those that ended workers left."""

from sqlalchemy.orm import Session

from service.queue import repository, workers_repository
from service.queue.broker import Kind
from service.queue.fence import Fence, Fenced
from service.queue.finish import take_back


def renew(session: Session, fence: Fence, lease_s: float) -> str:
    """Prolong the lease by `lease_s` from now (the database's now) and return what is desired of the job.

    Raises:
        Fenced: the job is another attempt's, or ended.
    """
    desired = repository.renew(session, fence.job_id, fence.attempt_no, fence.worker_id, lease_s)
    return _unless_fenced(fence, desired)


def read_desired(session: Session, fence: Fence) -> str:
    """Return what is desired of the job ("run", "pause", "preempt", "cancel"), without prolonging the lease.

    Raises:
        Fenced: the job is another attempt's, or ended.
    """
    desired = repository.desired(session, fence.job_id, fence.attempt_no, fence.worker_id)
    return _unless_fenced(fence, desired)


def _unless_fenced(fence: Fence, desired: str | None) -> str:
    if desired is None:
        raise Fenced(f"job {fence.job_id} is no longer attempt {fence.attempt_no}'s")
    return desired


def release_leases_of(session: Session, worker_id: str, *, max_attempts: int) -> set[Kind]:
    """Take back at once what a worker held that is known to be dead; return the kinds of work that wait now.

    Known means: the lock that it and its children held is free (`worker.locks`).
    """
    kinds: set[Kind] = set()
    for job in repository.lock_leases_of(session, worker_id):
        kind = take_back(
            session, job, lost=True, reason="its worker died", max_attempts=max_attempts
        )
        if kind is not None:
            kinds.add(kind)
    workers_repository.stop_worker(session, worker_id)
    return kinds
