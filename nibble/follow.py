"""Follow a job to its end over the event stream, through broken connections.

The stream is the fast way, not the truth: whether the job has ended is always asked of the job itself. Where a stream is
refused, or a proxy holds it back, the events are polled instead. Events are told once each, in order.
"""

import json
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import quote

from nibble.answers import expect_job
from nibble.connection import open_body, read_body
from nibble.endings import Ending
from nibble.events import JobEvent, read_event
from nibble.failures import ending_of, is_passing, unreachable
from nibble.sse import parse

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.fine_tuning import FineTuningJob

TERMINAL = ("succeeded", "failed", "cancelled")
POLL_S = 2.0
_EMPTY_STREAMS = 3
"""So many streams in a row that bring nothing: something between us holds them back, so we poll …"""
_POLL_FOR_S = 60.0
"""… for so long before another stream is tried."""


class Follower:
    """Follows one job; `run` returns it when it has ended.

    Args:
        client: of the SDK.
        job_id: the job.
        on_event: told each event, oldest first, as the API serves it.
        on_trouble: told once, in a sentence, each time the connection is lost.
        patience_s: how long the service may be out of reach before `run` gives up.
    """

    def __init__(
        self,
        client: "OpenAI",
        job_id: str,
        *,
        on_event: Callable[[JobEvent], None],
        on_trouble: Callable[[str], None],
        patience_s: float = 300.0,
    ) -> None:
        self._client = client.with_options(max_retries=0)  # waiting is ours here
        self._job_id = job_id
        self._on_event = on_event
        self._on_trouble = on_trouble
        self._patience_s = patience_s
        self._last_id: str | None = None  # of the stream: a seq
        self._told: set[str] = set()  # ids of events
        self._poll_until = -math.inf
        self._empty_streams = 0
        self._failures = 0
        self._reached_at = time.monotonic()

    def run(self) -> "FineTuningJob":
        """Return the job in its final status.

        Raises:
            Ending: refused (no such job, wrong key), or out of reach for longer than `patience_s`.
        """
        while True:
            try:
                if not self._polls():
                    self._listen()
                job = self._job()
                if self._polls() or job.status in TERMINAL:
                    self._catch_up()
            except Exception as error:  # noqa: BLE001  (_wait_out raises what cannot pass)
                self._wait_out(error)
                continue
            self._reached()
            if job.status in TERMINAL:
                return job
            time.sleep(POLL_S if self._polls() or self._empty_streams else 0.2)

    def _polls(self) -> bool:
        return time.monotonic() < self._poll_until

    def _job(self) -> "FineTuningJob":
        return expect_job(self._client.fine_tuning.jobs.retrieve(self._job_id))

    def _listen(self) -> None:
        """Tell what the stream brings until it ends or breaks (raises)."""
        from openai import APIStatusError

        headers = {"Accept": "text/event-stream"}
        if self._last_id is not None:
            headers["Last-Event-ID"] = self._last_id
        self._empty_streams += 1
        if self._empty_streams >= _EMPTY_STREAMS:
            self._poll_until = time.monotonic() + _POLL_FOR_S
        try:
            stream = open_body(
                self._client, f"/fine_tuning/jobs/{quote(self._job_id, safe='')}/stream", headers
            )
        except APIStatusError as error:
            if is_passing(error) and error.status_code != 501:
                raise
            self._poll_until = math.inf  # whether the job is refused too, asking for it will show
            return
        with stream:
            if not stream.response.headers.get("content-type", "").startswith("text/event-stream"):
                self._poll_until = math.inf
                return
            for event in parse(read_body(stream)):
                self._reached()
                self._empty_streams = 0
                self._poll_until = -math.inf
                if event is not None:
                    self._last_id = event.id or self._last_id
                    self._tell(_json(event.data))

    def _catch_up(self) -> None:
        """Tell the events that have not been told, read newest first."""
        missing: dict[str, dict[str, object]] = {}
        for event in self._client.fine_tuning.jobs.list_events(self._job_id, limit=100):
            if event.id in self._told or event.id in missing:
                break
            missing[event.id] = event.to_dict(mode="json")
        for document in reversed(missing.values()):
            self._tell(document)

    def _tell(self, document: object) -> None:
        event = read_event(document)
        if event is None or event.id in self._told:
            return
        if event.id:
            self._told.add(event.id)
        self._on_event(event)

    def _reached(self) -> None:
        self._reached_at = time.monotonic()
        self._failures = 0

    def _wait_out(self, error: Exception) -> None:
        """Sleep before the next try, or end here."""
        if not is_passing(error):
            raise error
        left_s = self._patience_s - (time.monotonic() - self._reached_at)
        if left_s <= 0:
            ending = ending_of(error) or unreachable(str(error))
            again = f"The job does not end with this command; watch it again with: nibble jobs watch {self._job_id}"
            raise Ending(ending.code, f"{ending.message} {again}", error=ending.error) from error
        if self._failures == 0:
            self._on_trouble("The connection was lost; trying again.")
        time.sleep(min(0.5 * 2**self._failures, 8.0, left_s))
        self._failures = min(self._failures + 1, 5)


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None
