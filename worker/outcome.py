"""How a child ended, and what that means for its job."""

import hashlib
import signal
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from service.adapters import actions as adapters
from service.adapters.names import fine_tuned_model_name
from service.files.actions import RESULTS_PURPOSE, register_produced
from service.jobs.results import results_csv
from service.queue import finish
from service.queue.broker import Kind
from service.queue.claim import Claim
from service.queue.fence import hold
from service.settings import Settings
from worker.context import WorkerContext
from worker.folder import AttemptFolder
from worker.limits import TimeLimit
from worker.log_tail import public_log_tail
from worker.reasons import DISK_FULL_STATUS, disk_full, out_of_memory

Cause = Literal["cancel", "time_limit", "pause", "preempt", "shutdown"]
"""Why the supervisor stopped a child; None where it ended by itself."""

_STOPPED = {
    "pause": "it was to be paused",
    "preempt": "another job needs its worker",
    "shutdown": "its worker is being stopped",
}
"""Why a job waits again that was stopped in good order."""


@dataclass(frozen=True)
class Verdict:
    """What is to become of the job."""

    kind: Literal["succeeded", "failed", "cancelled", "requeue"]
    result: dict[str, Any] = field(default_factory=dict[str, Any])
    error: finish.JobError | None = None
    lost: bool = False
    reason: str = ""
    detail: dict[str, Any] = field(default_factory=dict[str, Any])


_MEMORY_ENDED = ("memory allocation of", "std::bad_alloc")
"""What Rust and C++ say before they abort for want of memory."""


def judge(
    kind: Kind,
    folder: AttemptFolder,
    exit_status: int,
    cause: Cause | None,
    settings: Settings,
    *,
    time_limit: TimeLimit | None = None,
) -> Verdict:
    """Read a dead child's result and decide.

    Args:
        kind: of work.
        folder: of the attempt.
        exit_status: negative is a signal's number, as in subprocess.
        cause: why it was stopped.
        settings: the limits, and the folders that its log may name.
        time_limit: of the training; needed where that is the cause.
    """
    result = folder.read_result() or {}
    detail: dict[str, Any] = {"exit_status": exit_status, "versions": result.get("versions")}
    outcome = result.get("outcome")
    if outcome == "succeeded":
        return Verdict("succeeded", result=result, detail=detail)
    if cause == "cancel":
        return Verdict("cancelled", detail=detail)
    detail[finish.LOG_TAIL] = public_log_tail(folder, settings)
    if outcome == "failed" and isinstance(result.get("error"), dict):
        error = cast("finish.JobError", result["error"])
        return Verdict("failed", result=result, error=error, detail=detail)
    if cause == "time_limit" and time_limit is not None:
        return Verdict("failed", error=time_limit.error(), detail=detail)
    if cause is not None:
        return Verdict("requeue", reason=_STOPPED[cause], detail=detail)
    detail["log_tail"] = folder.log_tail()
    if exit_status == DISK_FULL_STATUS:
        return Verdict("failed", error=disk_full(), detail=detail)
    if kind == "validate" and exit_status in (-signal.SIGALRM, -signal.SIGXCPU):
        return Verdict("failed", error=_too_slow(settings.validate_time_s), detail=detail)
    if exit_status == -signal.SIGABRT and any(
        words in detail["log_tail"] for words in _MEMORY_ENDED
    ):
        error = _too_big() if kind == "validate" else out_of_memory()
        return Verdict("failed", error=error, detail=detail)
    return Verdict("requeue", lost=True, reason=_death(exit_status), detail=detail)


def _too_slow(time_s: int) -> finish.JobError:
    return {
        "code": "validation_timeout",
        "message": f"Checking the files took longer than {time_s} seconds.",
        "param": "training_file",
        "hint": "Split the file, or raise NIBBLE_VALIDATE_TIME_S.",
    }


def _too_big() -> finish.JobError:
    return {
        "code": "validation_out_of_memory",
        "message": "Checking the files took more memory than is allowed.",
        "param": "training_file",
        "hint": "Shorten the longest examples, or raise NIBBLE_VALIDATE_MEMORY_BYTES.",
    }


def _death(exit_status: int) -> str:
    if exit_status >= 0:
        return f"its process ended with status {exit_status} and without a result"
    number = -exit_status
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if number == signal.SIGKILL:
        return (
            f"its process was killed ({name}): by an operator, or by the system for want of memory"
        )
    return f"its process crashed ({name})"


def apply(
    context: WorkerContext, claim: Claim, folder: AttemptFolder, verdict: Verdict
) -> Kind | None:
    """Write a verdict and return the kind of work that waits because of it, if any. May be repeated after an outage.

    Raises:
        Fenced: the job is another attempt's, or ended: nothing was written.
        StorageFull, Unavailable, AdapterIncomplete: what a success made cannot be stored.
    """
    if verdict.kind == "succeeded":
        if claim.kind == "train":
            _succeed(context, claim, folder, verdict)
            return None
        with context.transaction() as session:
            finish.validated(
                session,
                claim.fence,
                report=verdict.result["report"],
                hyperparameters=verdict.result["hyperparameters"],
                memory_needed_bytes=verdict.result.get("memory_needed_bytes"),
            )
        return "train"
    with context.transaction() as session:
        if verdict.kind == "cancelled":
            finish.cancelled(session, claim.fence, detail=verdict.detail)
        elif verdict.kind == "failed" and verdict.error is not None:
            finish.failed(
                session,
                claim.fence,
                verdict.error,
                report=verdict.result.get("report"),
                detail=verdict.detail,
            )
        else:
            return finish.give_back(
                session,
                claim.fence,
                lost=verdict.lost,
                reason=verdict.reason,
                max_attempts=context.settings.max_attempts,
                detail=verdict.detail,
            )
    return None


def _succeed(context: WorkerContext, claim: Claim, folder: AttemptFolder, verdict: Verdict) -> None:
    """Store the adapter and the result file, then end the job in one fenced transaction."""
    job, result = claim.job, verdict.result
    adapter_step = int(result["adapter_step"])
    with context.transaction() as session:
        adapters.publish(
            session,
            context.storage,
            job,
            claim.fence.attempt_no,
            adapter_step,
            folder.path / str(result["adapter"]),
        )
        content = results_csv(session, job)
        hold(session, claim.fence)
    key = f"results/{job.id}/{claim.fence.attempt_no}.csv"
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "results.csv"
        path.write_bytes(content)
        context.storage.put_file(key, path)
    with context.transaction() as session:
        hold(session, claim.fence)
        results = register_produced(
            session,
            job.project_id,
            "step_metrics.csv",
            RESULTS_PURPOSE,
            key,
            len(content),
            hashlib.sha256(content).hexdigest(),
        )
        finish.succeeded(
            session,
            claim.fence,
            fine_tuned_model=fine_tuned_model_name(job, context.settings.organization_id),
            adapter_step=adapter_step,
            trained_tokens=int(result["trained_tokens"]),
            result_file=results.id,
            detail=verdict.detail,
        )
