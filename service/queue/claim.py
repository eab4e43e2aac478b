"""Taking the next piece of work.

Claims are rare (hours apart per slot), so they are serialised: each sees the shares that the one before it left.
"""

from dataclasses import dataclass

from sqlalchemy.orm import Session

from service.events.actions import NewEvent, append
from service.jobs.state import move
from service.queue import repository
from service.queue.broker import Kind
from service.queue.fence import Fence
from service.tables import Job


@dataclass(frozen=True)
class Claim:
    """A piece of work that is now this worker's: the job's row as claimed, and the right to write for it."""

    kind: Kind
    job: Job
    fence: Fence
    blobs: dict[str, str]
    """Where the bytes of the job's files are: file id → blob key."""


def claim(
    session: Session, *, kind: Kind, worker_id: str, host: str, lease_s: float
) -> Claim | None:
    """Give the worker the job whose turn it is, with the next attempt number and a lease; None: nothing waits."""
    repository.serialise_claims(session)
    waiting = repository.next_waiting(session, kind)
    if waiting is None:
        return None
    job = repository.grant(session, waiting.id, worker_id, lease_s)
    repository.insert_attempt(session, job, kind=kind, worker_id=worker_id, host=host)
    if kind == "train":
        job = move(
            session,
            job.id,
            "running",
            _start_event(session, job),
            attempt_no=job.attempt_no,
            release=False,
        )
    else:
        append(session, job.project_id, job.id, NewEvent(_validating(job)))
    fence = Fence(job.id, job.project_id, job.attempt_no, worker_id)
    files = [job.training_file, *([job.validation_file] if job.validation_file else [])]
    return Claim(kind, job, fence, repository.blob_keys(session, job.project_id, files))


def _start_event(session: Session, job: Job) -> NewEvent:
    again = repository.training_attempts_before(session, job.id, job.attempt_no)
    message = "Fine-tuning job started again" if again else "Fine-tuning job started"
    return NewEvent(message, data={"attempt_no": job.attempt_no}, attempt_no=job.attempt_no)


def _validating(job: Job) -> str:
    message = f"Validating training file: {job.training_file}"
    if job.validation_file is not None:
        message += f" and validation file: {job.validation_file}"
    return message
