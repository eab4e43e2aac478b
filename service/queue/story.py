"""What a worker adds to a job's story while an attempt runs, and what it asks about it."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from service.events.actions import NewEvent, append_all
from service.queue import repository
from service.queue.fence import Fence, hold


def tell(
    session: Session,
    fence: Fence,
    events: Sequence[NewEvent],
    *,
    attempt_no: int | None = None,
    estimated_finish: datetime | None = None,
    resumed_from_step: int | None = None,
) -> int:
    """Append the lines of an attempt's events.jsonl that are not in the story yet; return how many were new.

    Args:
        session: the transaction; telling the same lines again, after a commit whose answer was lost, is harmless.
        fence: the right to write.
        events: each with its `line_no`.
        attempt_no: whose lines they are; None: the fence's own, otherwise a predecessor's.
        estimated_finish: written with them, if known.
        resumed_from_step: noted with the attempt, where the lines tell of it.

    Raises:
        Fenced: the job is another attempt's, or ended.
    """
    hold(session, fence)
    teller = fence.attempt_no if attempt_no is None else attempt_no
    numbered = [(event.line_no, event) for event in events if event.line_no is not None]
    lines = [line for line, _ in numbered]
    told = (
        repository.told_lines(session, fence.job_id, teller, min(lines), max(lines))
        if lines
        else set[int]()
    )
    new = [replace(event, attempt_no=teller) for line, event in numbered if line not in told]
    if new:
        append_all(session, fence.project_id, fence.job_id, new)
    if estimated_finish is not None:
        repository.update_job(
            session, fence.job_id, fence.attempt_no, {"estimated_finish": estimated_finish}
        )
    if resumed_from_step is not None:
        values = {"resumed_from_step": resumed_from_step}
        repository.update_attempt(session, fence.job_id, teller, values)
    return len(new)


def started(session: Session, fence: Fence, *, pid: int, detail: dict[str, Any]) -> None:
    """Note the child's pid and what it runs on.

    Raises:
        Fenced: the job is another attempt's, or ended.
    """
    hold(session, fence)
    values = {"pid": pid, "detail": detail}
    repository.update_attempt(session, fence.job_id, fence.attempt_no, values)


def earlier_attempts(session: Session, fence: Fence) -> list[int]:
    """Return the numbers of the job's earlier training attempts, newest first."""
    attempts = repository.training_attempts_before(session, fence.job_id, fence.attempt_no)
    return [attempt.attempt_no for attempt in attempts]


def time_spent_s(session: Session, fence: Fence) -> float:
    """Return how long the job's earlier training attempts took together; of a lost one until its loss was seen."""
    attempts = repository.training_attempts_before(session, fence.job_id, fence.attempt_no)
    return sum(
        (attempt.ended_at - attempt.started_at).total_seconds()
        for attempt in attempts
        if attempt.ended_at is not None
    )


def ended_among(session: Session, job_ids: Sequence[str]) -> set[str]:
    """Return which of these jobs have ended, so that nobody will take up their attempts."""
    return repository.ended_among(session, job_ids)
