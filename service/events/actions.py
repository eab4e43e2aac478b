"""Adding to a job's story."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy.orm import Session

from service import clock
from service.events import repository
from service.ids import new_id

Level = Literal["info", "warn", "error"]


@dataclass(frozen=True)
class NewEvent:
    """One line of a job's story, before it has its number.

    `attempt_no` and `line_no` say which line of which attempt's events.jsonl it came from, if any.
    """

    message: str
    level: Level = "info"
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] | None = None
    attempt_no: int | None = None
    line_no: int | None = None
    created_at: datetime | None = None


def append(session: Session, project_id: str, job_id: str, *events: NewEvent) -> int:
    """Append `events` to the job's story and return the last one's `seq`.

    The caller's transaction holds the job's row from here to its end: call it late, commit soon.
    """
    return append_all(session, project_id, job_id, events)


def append_all(
    session: Session, project_id: str, job_id: str, events: Sequence[NewEvent]
) -> int:
    """The same for a sequence; an empty one is an error of the caller (ValueError)."""
    if not events:
        raise ValueError("no events to append")
    first = repository.take_seq(session, job_id, len(events))
    rows = [
        {
            "job_id": job_id,
            "seq": first + i,
            "id": new_id("ftevent-"),
            "project_id": project_id,
            "created_at": event.created_at or clock.now(),
            "level": event.level,
            "type": event.type,
            "message": event.message,
            "data": event.data,
            "attempt_no": event.attempt_no,
            "line_no": event.line_no,
        }
        for i, event in enumerate(events)
    ]
    repository.insert_all(session, rows)
    return first + len(rows) - 1
