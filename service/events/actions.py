"""Adding to a job's story."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy.orm import Session

from service import clock
from service.events import repository
from service.events.content import storable, storable_text
from service.ids import new_id
from service.tables import Event

MAX_PAGE = 1_000
_BATCH = 1_000

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


def append_all(session: Session, project_id: str, job_id: str, events: Sequence[NewEvent]) -> int:
    """The same for a sequence; an empty one is an error of the caller (ValueError).

    Content that the database or JSON cannot hold is mended, never refused: see `service.events.content`. Whoever
    listens for the job's events (`service.events.feed`) is woken by the commit.
    """
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
            "message": storable_text(event.message),
            "data": storable(event.data),
            "attempt_no": event.attempt_no,
            "line_no": event.line_no,
        }
        for i, event in enumerate(events)
    ]
    repository.insert_all(session, rows)
    repository.notify(session, job_id)
    return first + len(rows) - 1


def list_events(
    session: Session, project_id: str, job_id: str, *, after: str | None, limit: int
) -> tuple[list[Event], bool]:
    """Return up to `limit` events of a job (1,000 at most), newest first, and whether there are more.

    `after` is the id of the last event already seen; an unknown one has nothing after it.
    """
    limit = min(limit, MAX_PAGE)
    events = repository.page(session, project_id, job_id, after=after, limit=limit + 1)
    return list(events[:limit]), len(events) > limit


def following(
    session: Session, project_id: str, job_id: str, *, after: int, limit: int
) -> Sequence[Event]:
    """Return up to `limit` events of a job after number `after`, oldest first."""
    return repository.after(session, project_id, job_id, after, limit)


def metrics(session: Session, project_id: str, job_id: str) -> Iterator[Event]:
    """Yield every metrics event of a job, oldest first, read a thousand at a time."""
    seq = 0
    while batch := repository.metrics_after(session, project_id, job_id, seq, _BATCH):
        yield from batch
        seq = batch[-1].seq
