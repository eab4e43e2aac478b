"""A job's story: in pages, and as a stream while it happens."""

from typing import Annotated, Any, Literal

from anyio.to_thread import run_sync
from fastapi import APIRouter, Header, Query
from pydantic import BaseModel, ConfigDict

from api.deps import CallerDep, SessionDep, State, StateDep
from api.errors import errors
from api.routes.jobs import JobOut
from api.streaming import Batch, EventStream, Message, follow
from service import clock
from service.db import transaction
from service.errors import InvalidRequest, NotFound, Unavailable
from service.events import actions as events
from service.jobs import actions as jobs
from service.jobs.state import TERMINAL
from service.tables import Event

router = APIRouter(prefix="/fine_tuning/jobs/{job_id}", tags=["Fine-tuning"])

_BATCH = 200
_MAX_SEQ = 2**63 - 1


class EventOut(BaseModel):
    """A line of a job's story."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None
    """Of metrics: step, total_steps, train_loss, learning_rate, memory and so on."""

    seq: int
    """Its number in the job's story; the stream's event id."""
    attempt: int | None
    """Which attempt told it."""

    @classmethod
    def of(cls, event: Event) -> "EventOut":
        """Show an event."""
        return cls.model_validate(
            {
                "id": event.id,
                "created_at": clock.unix(event.created_at),
                "level": event.level,
                "message": event.message,
                "type": event.type,
                "data": event.data,
                "seq": event.seq,
                "attempt": event.attempt_no,
            }
        )


class EventList(BaseModel):
    """A page of events."""

    object: Literal["list"] = "list"
    data: list[EventOut]
    has_more: bool


@router.get("/events", responses=errors(NotFound))
def list_events(
    job_id: str,
    caller: CallerDep,
    session: SessionDep,
    after: str | None = None,
    limit: Annotated[int, Query(ge=0)] = 20,
) -> EventList:
    """List a job's events and metrics, newest first."""
    job = jobs.get(session, caller.project_id, job_id)
    found, has_more = events.list_events(
        session, caller.project_id, job.id, after=after, limit=limit
    )
    return EventList(data=[EventOut.of(event) for event in found], has_more=has_more)


@router.get(
    "/stream",
    status_code=200,
    response_class=EventStream,
    responses={200: {"content": {"text/event-stream": {}}}, **errors(NotFound, Unavailable)},
)
async def stream_events(
    job_id: str,
    caller: CallerDep,
    state: StateDep,
    after: Annotated[int, Query(ge=0, le=_MAX_SEQ)] = 0,
    last_event_id: Annotated[str | None, Header()] = None,
) -> EventStream:
    """Stream a job's events and metrics as server-sent events: those so far, then each as it happens.

    `Last-Event-ID` (or `?after=`) is the `seq` of the last one already seen. The last event, `done`, carries the job.
    """
    state.feed.check_room()
    seen = max(after, _seq(last_event_id))

    async def look(after: int) -> Batch:
        # Few streams at a time: many of them cannot keep other requests from the database.
        return await run_sync(
            _read, state, caller.project_id, job_id, after, limiter=state.stream_reads
        )

    first = await look(seen)  # an unknown job is a 404, not a broken stream
    return EventStream(follow(state.feed, job_id, look, first, seen))


def _read(state: State, project_id: str, job_id: str, after: int) -> Batch:
    """Return what a stream sends after number `after`, in a transaction of its own."""
    with transaction(state.sessions) as session:
        # The job first: if it has ended, then its last event is among those read after it.
        job = jobs.get(session, project_id, job_id)
        found = events.following(session, project_id, job_id, after=after, limit=_BATCH)
        messages = [Message(e.type, _json(EventOut.of(e)), e.seq) for e in found]
        if job.status not in TERMINAL or len(found) == _BATCH:
            return Batch(messages, more=len(found) == _BATCH)
        step = jobs.progress(session, [job]).get(job_id)
        done = Message("done", _json(JobOut.of(job, state.settings, step)))
        return Batch([*messages, done], ended=True)


def _json(content: BaseModel) -> str:
    """One line of ASCII: some clients also cut lines at U+2028 and its like."""
    return content.model_dump_json(ensure_ascii=True)


def _seq(last_event_id: str | None) -> int:
    if last_event_id is None or not last_event_id.strip():
        return 0
    text = last_event_id.strip()
    # Its length first: to read a number of thousands of digits is an error of its own.
    is_number = text.isascii() and text.isdecimal() and len(text) <= len(str(_MAX_SEQ))
    if not is_number or int(text) > _MAX_SEQ:
        raise InvalidRequest(
            "The Last-Event-ID header must be the id of an event of this stream, a whole number.",
            param="Last-Event-ID",
        )
    return int(text)
