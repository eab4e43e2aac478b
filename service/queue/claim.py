"""Taking the next piece of work.

Claims are rare (hours apart per slot), so they are serialised: each sees the shares that the one before it left.
A job that needs more memory than the slot's GPU has is left for a slot whose GPU has it.
"""

from dataclasses import dataclass

from sqlalchemy.orm import Session

from service.events.actions import NewEvent, append
from service.jobs.state import move
from service.queue import line_repository, repository
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
    session: Session,
    *,
    kind: Kind,
    worker_id: str,
    host: str,
    lease_s: float,
    room_bytes: int | None = None,
) -> Claim | None:
    """Give the worker the job whose turn it is, with the next attempt number and a lease; None: nothing waits for it.

    Args:
        session: the transaction; other claims wait for its end.
        kind: of work.
        worker_id: who asks.
        host: where it runs.
        lease_s: how long the lease is.
        room_bytes: what its device has for a job (`service.queue.fit.room`); None: that is not known, so anything fits.
    """
    line_repository.serialise_claims(session)
    turn = line_repository.next_waiting(session, kind, room_bytes)
    if turn is None:
        return None
    lease = repository.new_lease(worker_id, lease_s)
    if kind == "train":
        job = move(
            session,
            turn.job_id,
            "running",
            _start_event(session, turn.job_id, turn.attempt_no),
            release=False,
            next_attempt_no=turn.attempt_no,
            **lease,
        )
    else:
        job = repository.grant(session, turn.job_id, turn.attempt_no, lease)
        append(session, job.project_id, job.id, NewEvent(_validating(job)))
    repository.insert_attempt(session, job, kind=kind, worker_id=worker_id, host=host)
    fence = Fence(job.id, job.project_id, job.attempt_no, worker_id)
    files = [job.training_file, *([job.validation_file] if job.validation_file else [])]
    return Claim(kind, job, fence, repository.blob_keys(session, job.project_id, files))


def _start_event(session: Session, job_id: str, attempt_no: int) -> NewEvent:
    again = repository.was_trained_before(session, job_id, attempt_no)
    message = "Fine-tuning job started again" if again else "Fine-tuning job started"
    return NewEvent(message, data={"attempt_no": attempt_no}, attempt_no=attempt_no)


def _validating(job: Job) -> str:
    message = f"Validating training file: {job.training_file}"
    if job.validation_file is not None:
        message += f" and validation file: {job.validation_file}"
    return message
