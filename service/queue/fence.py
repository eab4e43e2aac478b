"""The right to write for a job: only its newest attempt, and only while that one holds the lease.

`attempt_no` is the fence. The lease's end is not tested here on purpose: a worker that comes back from a database
outage longer than its lease may go on, as long as nobody else was given the job.
"""

from dataclasses import dataclass

from sqlalchemy.orm import Session

from service.jobs.state import Fenced
from service.queue import repository
from service.tables import Job

__all__ = ["Fence", "Fenced", "hold"]


@dataclass(frozen=True)
class Fence:
    """Names one attempt of one job and the worker that runs it."""

    job_id: str
    project_id: str
    attempt_no: int
    worker_id: str


def hold(session: Session, fence: Fence) -> Job:
    """Lock the job's row for the rest of the transaction and return it, if it still is this attempt's.

    Raises:
        Fenced: it is not; stop, write nothing.
    """
    job = repository.lock_held(session, fence.job_id, fence.attempt_no, fence.worker_id)
    if job is None:
        raise Fenced(f"job {fence.job_id} is no longer attempt {fence.attempt_no}'s")
    return job
