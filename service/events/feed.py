"""Being woken when a job's story goes on: one listening connection per process, and only while someone waits.

PostgreSQL's NOTIFY wakes; the events themselves are read from the table. A notification may be lost (a broken
connection), so whoever waits also looks by itself now and then: a wake-up is a hint, never the truth.
"""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager

import psycopg
from psycopg import sql
from sqlalchemy.engine import make_url

from service.errors import Unavailable
from service.events.repository import CHANNEL
from service.logging import get_logger
from service.settings import Settings

MAX_WAITING = 512
"""Per process: streams beyond it are refused, so that they cannot use up its memory and descriptors."""

_RECONNECT_S = (0.2, 5.0)
log = get_logger(__name__)


class Subscription:
    """One waiter for one job. Everything on it happens in its event loop."""

    def __init__(self) -> None:
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Let `wait` return."""
        self._woken.set()

    def rearm(self) -> None:
        """Forget earlier wake-ups. Call it before reading, so that none in between is lost."""
        self._woken.clear()

    async def wait(self, timeout_s: float) -> bool:
        """Return when woken since `rearm`, or after `timeout_s`; False: nobody woke."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._woken.wait()
        except TimeoutError:
            return False
        return True


class Feed:
    """Hands PostgreSQL's notifications to those who wait for a job. Belongs to one event loop."""

    def __init__(self, database_url: str, *, max_waiting: int = MAX_WAITING) -> None:
        """`database_url` is libpq's form, `postgresql://…`."""
        self._url = database_url
        self._max_waiting = max_waiting
        self._waiting: dict[str, set[Subscription]] = {}
        self._count = 0
        self._listener: asyncio.Task[None] | None = None
        self._closed = False

    @classmethod
    def of(cls, settings: Settings) -> "Feed":
        """Return the feed of the configured database; it connects when the first one waits."""
        if settings.database_url is None:
            raise ValueError("a feed needs a database")
        url = make_url(settings.database_url.get_secret_value())
        return cls(url.set(drivername="postgresql").render_as_string(hide_password=False))

    @property
    def closed(self) -> bool:
        """Whether the process is about to end; streams then end too, and clients come back elsewhere."""
        return self._closed

    @property
    def waiting(self) -> int:
        """How many wait."""
        return self._count

    def check_room(self) -> None:
        """Refuse another waiter if there is no room for one.

        Raises:
            Unavailable: too many wait already, or the process is about to end.
        """
        if self._closed or self._count >= self._max_waiting:
            raise Unavailable(
                f"{self._count} streams are open already. Try again later, or list the job's events instead."
            )

    @contextmanager
    def subscribe(self, job_id: str) -> Generator[Subscription]:
        """Wait for a job's events inside the block.

        Raises:
            Unavailable: too many wait already, or the process is about to end.
        """
        self.check_room()
        subscription = Subscription()
        self._waiting.setdefault(job_id, set()).add(subscription)
        self._count += 1
        if self._listener is None or self._listener.done():
            self._listener = asyncio.get_running_loop().create_task(self._listen())
        try:
            yield subscription
        finally:
            self._leave(job_id, subscription)

    def _leave(self, job_id: str, subscription: Subscription) -> None:
        self._count -= 1
        waiting = self._waiting[job_id]
        waiting.discard(subscription)
        if not waiting:
            del self._waiting[job_id]
        if not self._count and self._listener is not None:
            self._listener.cancel()
            self._listener = None

    async def close(self) -> None:
        """Wake everyone for the last time and let go of the connection."""
        self._closed = True
        self._wake_all()
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)

    async def _listen(self) -> None:
        pause_s = _RECONNECT_S[0]
        while True:
            try:
                async with await self._connect() as connection:
                    pause_s = _RECONNECT_S[0]
                    self._wake_all()  # whatever was told before we listened
                    async for notification in connection.notifies():
                        self._wake(notification.payload)
            except (psycopg.Error, OSError) as error:
                log.warning("event_feed_lost", error=str(error), again_in_s=pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _RECONNECT_S[1])

    async def _connect(self) -> psycopg.AsyncConnection:
        connection = await psycopg.AsyncConnection.connect(
            self._url,
            autocommit=True,
            connect_timeout=5,
            application_name="nibble-events",
            keepalives_idle=30,  # a server that vanished is noticed within a minute
            keepalives_interval=10,
            keepalives_count=3,
        )
        try:
            await connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(CHANNEL)))
        except BaseException:
            await connection.close()
            raise
        return connection

    def _wake(self, job_id: str) -> None:
        for subscription in self._waiting.get(job_id, ()):
            subscription.wake()

    def _wake_all(self) -> None:
        for job_id in self._waiting:
            self._wake(job_id)
