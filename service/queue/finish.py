"""Every way an attempt ends. Each is one transaction under the fence, with its event and outbox row."""

import signal
from typing import Any

from sqlalchemy.orm import Session

from service.events.actions import NewEvent, append
from service.jobs.state import Status, move
from service.queue import repository
from service.queue.broker import Kind
from service.queue.fence import Fence, hold
from service.tables import Job

JobError = dict[str, Any]
"""A job's `error`: {code, message, param} and, where there is one, hint and log_tail."""

LOG_TAIL = "public_log_tail"
"""Of an attempt's detail: the end of its child's log as users may read it (`worker.log_tail`)."""


def validated(
    session: Session,
    fence: Fence,
    *,
    report: dict[str, Any],
    hyperparameters: dict[str, Any],
    memory_needed_bytes: int | None = None,
) -> None:
    """The files are good: keep the report, the resolved hyperparameters and the need, and let the job wait for training.

    A wish to cancel that came too late for the worker to see is fulfilled here: nobody would look at it while it waits.
    So is a wish to pause.

    Raises:
        Fenced: the job is another attempt's, or ended. The same holds for every function of this module.
    """
    desired = hold(session, fence).desired
    if desired == "cancel":
        cancelled(session, fence)
        return
    to: Status = "paused" if desired == "pause" else "queued"
    repository.end_attempt(session, fence.job_id, fence.attempt_no, "succeeded", None)
    move(
        session,
        fence.job_id,
        to,
        NewEvent(f"Files validated, moving job to {to} state"),
        attempt_no=fence.attempt_no,
        source=("validating_files",),
        dataset_report=report,
        hyperparameters=hyperparameters,
        memory_needed_bytes=memory_needed_bytes,
        lost_attempts=0,  # the training gets its own patience
    )


def succeeded(
    session: Session,
    fence: Fence,
    *,
    fine_tuned_model: str,
    adapter_step: int,
    trained_tokens: int,
    result_file: str,
    detail: dict[str, Any],
) -> None:
    """The training is done and its adapter, of `adapter_step`, published: name the model and end the job."""
    hold(session, fence)
    repository.end_attempt(session, fence.job_id, fence.attempt_no, "succeeded", detail)
    append(
        session,
        fence.project_id,
        fence.job_id,
        NewEvent(f"New fine-tuned model created: {fine_tuned_model}", attempt_no=fence.attempt_no),
    )
    move(
        session,
        fence.job_id,
        "succeeded",
        NewEvent("The job has successfully completed", attempt_no=fence.attempt_no),
        attempt_no=fence.attempt_no,
        fine_tuned_model=fine_tuned_model,
        adapter_step=adapter_step,
        trained_tokens=trained_tokens,
        result_files=[result_file],
        estimated_finish=None,
    )


def failed(
    session: Session,
    fence: Fence,
    error: JobError,
    *,
    report: dict[str, Any] | None = None,
    detail: dict[str, Any] | None = None,
) -> None:
    """The attempt found something that another one would find again: the job ends with the reason.

    A wish to cancel that came while this could not be written is fulfilled instead.
    """
    if hold(session, fence).desired == "cancel":
        cancelled(session, fence, detail=detail)
        return
    repository.end_attempt(session, fence.job_id, fence.attempt_no, "failed", detail)
    values: dict[str, Any] = {"error": _with_log_tail(error, detail), "estimated_finish": None}
    if report is not None:
        values["dataset_report"] = report
    move(
        session,
        fence.job_id,
        "failed",
        _failure_event(error, fence.attempt_no),
        attempt_no=fence.attempt_no,
        **values,
    )


def cancelled(session: Session, fence: Fence, *, detail: dict[str, Any] | None = None) -> None:
    """The wish to cancel is fulfilled: the child is gone and its device is free."""
    job = hold(session, fence)
    repository.end_attempt(session, fence.job_id, fence.attempt_no, "cancelled", detail)
    _cancel(session, job, job.lost_attempts)


def give_back(
    session: Session,
    fence: Fence,
    *,
    lost: bool,
    reason: str,
    max_attempts: int,
    detail: dict[str, Any] | None = None,
) -> Kind | None:
    """The attempt ends without an end of the job: it waits again, or is paused, and goes on from its last resume point.

    What is wished of the job decides: this is where a wish to pause, to preempt or to cancel is fulfilled.

    Args:
        session: the transaction.
        fence: the attempt.
        lost: whether this counts towards `max_attempts` (a death does; a pause, a preemption, a worker's stop do not).
        reason: ends the sentence "The job goes back to the queue: …".
        max_attempts: a job lost this often in a row fails.
        detail: kept with the attempt, for the operator; of it only `LOG_TAIL` gets into the job's error.

    Returns:
        The kind of work that waits now, None if none does: the job is paused, or has ended.
    """
    job = hold(session, fence)
    return take_back(
        session, job, lost=lost, reason=reason, max_attempts=max_attempts, detail=detail
    )


def take_back(
    session: Session,
    job: Job,
    *,
    lost: bool,
    reason: str,
    max_attempts: int,
    detail: dict[str, Any] | None = None,
) -> Kind | None:
    """The same for a job whose row the caller has locked; for the reaper, which holds no fence."""
    kind: Kind = "train" if job.status == "running" else "validate"
    pauses = kind == "train" and job.desired == "pause"
    outcome = "lost" if lost else "paused" if pauses else "requeued"
    repository.end_attempt(session, job.id, job.attempt_no, outcome, detail)
    lost_attempts = job.lost_attempts + 1 if lost else 0  # what was stopped in good order was alive
    if job.desired == "cancel":
        _cancel(session, job, lost_attempts)
        return None
    if lost_attempts >= max_attempts:
        _fail_lost(session, job, lost_attempts, reason, detail)
        return None
    message = f"The job goes back to the queue: {reason}"
    if pauses:
        message = f"Fine-tuning job paused{f': {reason}' if lost else ''}"
    event = NewEvent(
        message,
        level="warn" if lost else "info",
        data={"attempt_no": job.attempt_no, "lost_attempts": lost_attempts},
        attempt_no=job.attempt_no,
    )
    if kind == "train":
        move(
            session,
            job.id,
            "paused" if pauses else "queued",
            event,
            attempt_no=job.attempt_no,
            source=("running",),
            desired="pause" if pauses else "run",  # a preemption is fulfilled
            lost_attempts=lost_attempts,
            estimated_finish=None,
        )
    else:
        values = {"lost_attempts": lost_attempts, "lease_owner": None, "lease_until": None}
        repository.update_job(session, job.id, job.attempt_no, values)
        append(session, job.project_id, job.id, event)
    return None if pauses else kind


def _cancel(session: Session, job: Job, lost_attempts: int) -> None:
    move(
        session,
        job.id,
        "cancelled",
        NewEvent("Fine-tuning job cancelled", attempt_no=job.attempt_no),
        attempt_no=job.attempt_no,
        lost_attempts=lost_attempts,
        estimated_finish=None,
    )


_HINT = "The worker's log says more."
_MEMORY_HINT = (
    f"{_HINT} If its machine was short of memory, use a smaller batch_size or context_length."
)


def _fail_lost(
    session: Session, job: Job, lost_attempts: int, reason: str, detail: dict[str, Any] | None
) -> None:
    was_killed = detail is not None and detail.get("exit_status") == -signal.SIGKILL
    error: JobError = {
        "code": "worker_lost",
        "message": f"The job was lost {lost_attempts} times in a row, the last time because {reason}.",
        "param": None,
        "hint": _MEMORY_HINT if was_killed else _HINT,
    }
    move(
        session,
        job.id,
        "failed",
        _failure_event(error, job.attempt_no),
        attempt_no=job.attempt_no,
        error=_with_log_tail(error, detail),
        lost_attempts=lost_attempts,
        estimated_finish=None,
    )


def _with_log_tail(error: JobError, detail: dict[str, Any] | None) -> JobError:
    tail = (detail or {}).get(LOG_TAIL)
    return error | {"log_tail": tail} if tail else error


def _failure_event(error: JobError, attempt_no: int) -> NewEvent:
    return NewEvent(
        error["message"], level="error", data={"code": error["code"]}, attempt_no=attempt_no
    )
