"""Server-sent events over a job: what is there, then what comes, until the job has ended.

A stream holds no database connection and no thread while it waits.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

import anyio
from fastapi.sse import format_sse_event
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.responses import StreamingResponse
from starlette.types import Send

from service.events.feed import Feed
from service.logging import get_logger

HEARTBEAT_S = 15.0
"""A comment at least so often: proxies cut connections that are silent, and a client that has gone is noticed."""
POLL_S = 10.0
"""How often a stream looks by itself, should a notification get lost."""
RECONNECT_MS = 1000
"""What a browser is told to wait before it comes back."""

_OUTAGE_PAUSE_S = 2.0

log = get_logger(__name__)


@dataclass(frozen=True)
class Message:
    """One server-sent event: its name, its JSON, and its id if it can be resumed from."""

    event: str
    data: str
    seq: int | None = None

    def encode(self) -> bytes:
        """Return its bytes on the wire."""
        seq = None if self.seq is None else str(self.seq)
        return format_sse_event(data_str=self.data, event=self.event, id=seq)


@dataclass(frozen=True)
class Batch:
    """What one look at the table gave: messages, whether more are there now, whether these are the last."""

    messages: list[Message]
    more: bool = False
    ended: bool = False


class EventStream(StreamingResponse):
    """A response of server-sent events whose source is closed at once when the client goes.

    FastAPI's own `EventSourceResponse` wants the route to be the generator, whose first step comes after the status
    line; here an unknown job is still a 404.
    """

    media_type = "text/event-stream"

    def __init__(self, content: AsyncGenerator[bytes]) -> None:
        super().__init__(
            content,
            headers={
                "cache-control": "no-store",
                "x-accel-buffering": "no",  # nginx would hold events back
            },
        )
        self._source = content

    async def stream_response(self, send: Send) -> None:
        """Send until the source ends."""
        async with contextlib.aclosing(self._source):
            await super().stream_response(send)


async def follow(
    feed: Feed,
    job_id: str,
    look: Callable[[int], Awaitable[Batch]],
    first: Batch,
    seen: int,
    *,
    heartbeat_s: float = HEARTBEAT_S,
    poll_s: float = POLL_S,
) -> AsyncGenerator[bytes]:
    """Yield `first`, then whatever `look` finds after it, as soon as the feed says so.

    Args:
        feed: wakes when the job's story goes on.
        job_id: the job.
        look: returns what comes after a `seq`.
        first: what it returned already, after `seen`.
        seen: the `seq` of the last event that the client has.
        heartbeat_s: a comment at least so often.
        poll_s: a look at least so often.
    """
    loop = asyncio.get_running_loop()
    yield f"retry: {RECONNECT_MS}\n\n".encode()
    batch, spoken_at = first, loop.time()
    with feed.subscribe(job_id) as subscription:
        subscription.wake()  # for what came between the first look and now
        while True:
            if batch.messages:
                yield b"".join(message.encode() for message in batch.messages)
                seen = max(seen, *(message.seq or 0 for message in batch.messages))
                spoken_at = loop.time()
            if batch.ended or feed.closed:
                return
            if not batch.more:
                silence_s = loop.time() - spoken_at
                await subscription.wait(min(poll_s, max(heartbeat_s - silence_s, 0)))
                if loop.time() - spoken_at >= heartbeat_s:
                    yield b": still here\n\n"
                    spoken_at = loop.time()
            subscription.rearm()  # before the look, so that nothing falls between the two
            batch = await _look(look, seen)


async def _look(look: Callable[[int], Awaitable[Batch]], seen: int) -> Batch:
    """Look; while the database is away there is nothing new, and the stream stays."""
    try:
        return await look(seen)
    except (OperationalError, InterfaceError, PoolTimeout) as error:
        log.warning("stream_waits_for_database", error=str(error).split("\n", 1)[0])
        await anyio.sleep(_OUTAGE_PAUSE_S)
        return Batch([])
