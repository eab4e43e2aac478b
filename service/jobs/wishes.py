"""What may be wished of a job that is there: pause, resume, preempt, cancel.

What nobody works on is moved at once. Of a job that a worker holds only the wish is written (`Job.desired`); the worker
fulfils it when its child is gone (`service.queue.finish`). Each of them holds the job's row, so no claim and no end can
come between the look and the write. A wish that is fulfilled already changes nothing and is no error: a retried call
gets the same answer.
"""

from sqlalchemy.orm import Session

from service.errors import InvalidRequest
from service.events.actions import NewEvent, append
from service.jobs import repository
from service.jobs.actions import no_such_job
from service.jobs.state import TERMINAL, move
from service.tables import Job

_DONE = {"succeeded": "succeeded", "failed": "failed", "cancelled": "been cancelled"}


def cancel(session: Session, project_id: str, job_id: str) -> Job:
    """End a job that nobody works on; of one that a worker holds, note the wish.

    Raises:
        NotFound: there is no such job.
        InvalidRequest: it has already ended.
    """
    job = _lock_live(session, project_id, job_id, "cancelled")
    if job.lease_owner is None:
        event = NewEvent("Fine-tuning job cancelled")
        return move(session, job_id, "cancelled", event, desired="cancel", estimated_finish=None)
    if job.desired != "cancel":
        _wish(session, job, "cancel", "Cancelling: waiting for the worker to stop")
    return job


def pause(session: Session, project_id: str, job_id: str) -> Job:
    """Pause a job that waits for training; of one that is trained or validated, note the wish.

    Validation is not broken off: it takes seconds and no GPU, and the job is paused after it.

    Raises:
        NotFound: there is no such job.
        InvalidRequest: it has already ended, or is being cancelled.
    """
    job = _lock_live(session, project_id, job_id, "paused")
    _check_not_cancelled(job, "paused")
    if job.status == "queued":
        event = NewEvent("Fine-tuning job paused")
        return move(session, job_id, "paused", event, source=("queued",), desired="pause")
    if job.desired != "pause":
        first = "its files are validated" if job.status == "validating_files" else "it has stopped"
        _wish(session, job, "pause", f"Pausing: the job is paused when {first}")
    return job


def resume(session: Session, project_id: str, job_id: str) -> Job:
    """Let a paused job wait for training again; a wish to pause that is not fulfilled yet is taken back.

    Raises:
        NotFound: there is no such job.
        InvalidRequest: it has already ended, or is being cancelled.
    """
    job = _lock_live(session, project_id, job_id, "resumed")
    _check_not_cancelled(job, "resumed")
    if job.status == "paused":
        event = NewEvent("Fine-tuning job resumed: it waits for a worker")
        return move(session, job_id, "queued", event, source=("paused",), desired="run")
    if job.desired == "pause":
        _wish(session, job, "run", "Fine-tuning job resumed: it is not paused after all")
    return job


def preempt(session: Session, project_id: str, job_id: str) -> bool:
    """Have a training job give up its worker and wait again; False: it does not train, or is to stop anyway.

    Raises:
        NotFound: there is no such job.
    """
    job = repository.lock(session, project_id, job_id)
    if job is None:
        raise no_such_job(job_id)
    if job.status != "running" or job.desired != "run":
        return False
    _wish(session, job, "preempt", "Preempting: another job needs the worker")
    return True


def _lock_live(session: Session, project_id: str, job_id: str, what: str) -> Job:
    job = repository.lock(session, project_id, job_id)
    if job is None:
        raise no_such_job(job_id)
    if job.status in TERMINAL:
        raise InvalidRequest(
            f"Job {job_id} has already {_DONE[job.status]}; only a job that has not ended can be {what}.",
            param="fine_tuning_job_id",
            code="job_already_ended",
        )
    return job


def _check_not_cancelled(job: Job, what: str) -> None:
    if job.desired == "cancel":
        raise InvalidRequest(
            f"Job {job.id} is being cancelled, so it cannot be {what}.",
            param="fine_tuning_job_id",
            code="job_being_cancelled",
        )


def _wish(session: Session, job: Job, desired: str, message: str) -> None:
    repository.update_desired(session, job.id, desired)
    append(session, job.project_id, job.id, NewEvent(message))
    session.refresh(job)
