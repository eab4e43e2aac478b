"""Following a job through connections that break, over a real network path."""

import threading
import time
from collections.abc import Callable

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from nibble import follow
from nibble.endings import Ending, ExitCode
from nibble.events import JobEvent
from nibble.follow import Follower
from tests.nibble.conftest import Live
from tests.nibble.proxy import Proxy

Follow = Callable[..., FineTuningJob]


def story(client: openai.OpenAI, job_id: str) -> list[str]:
    """The ids of all of a job's events, oldest first, as the API lists them."""
    return [event.id for event in client.fine_tuning.jobs.list_events(job_id, limit=100)][::-1]


class Watched:
    """What a follower told."""

    def __init__(self) -> None:
        self.events: list[JobEvent] = []
        self.troubles: list[str] = []

    def follow(
        self, through: Proxy, client: openai.OpenAI, job_id: str, **limits: float
    ) -> FineTuningJob:
        client = client.with_options(base_url=through.url)
        return Follower(
            client,
            job_id,
            on_event=self.events.append,
            on_trouble=self.troubles.append,
            **limits,
        ).run()

    @property
    def ids(self) -> list[str]:
        return [event.id for event in self.events]


def test_a_stream_that_breaks_again_and_again_tells_each_event_once(
    proxy: Proxy, client: openai.OpenAI, finished_job: FineTuningJob
) -> None:
    proxy.cut("/stream", after_bytes=1500, times=4)
    watched = Watched()

    job = watched.follow(proxy, client, finished_job.id)

    assert job.status == "succeeded"
    assert watched.ids == story(client, job.id)
    streams = proxy.seen("/stream")
    assert len(streams) == 5
    assert "last-event-id" not in streams[0].lower()
    assert all("last-event-id" in head.lower() for head in streams[1:])
    assert watched.troubles


def test_a_running_job_is_followed_across_a_break(
    proxy: Proxy, client: openai.OpenAI, long_job: FineTuningJob
) -> None:
    proxy.cut("/stream", after_bytes=2500, times=2)
    watched = Watched()
    threading.Timer(2.0, client.fine_tuning.jobs.cancel, [long_job.id]).start()

    job = watched.follow(proxy, client, long_job.id)

    assert job.status == "cancelled"
    assert watched.ids == story(client, job.id)


def test_a_refused_stream_is_replaced_by_polling(
    proxy: Proxy, client: openai.OpenAI, finished_job: FineTuningJob
) -> None:
    proxy.refused = "/stream"
    watched = Watched()

    job = watched.follow(proxy, client, finished_job.id)

    assert job.status == "succeeded"
    assert watched.ids == story(client, job.id)
    assert len(proxy.seen("/stream")) == 1


def test_streams_that_never_bring_anything_are_replaced_by_polling(
    proxy: Proxy, client: openai.OpenAI, finished_job: FineTuningJob
) -> None:
    proxy.cut("/stream", after_bytes=0, times=100)
    watched = Watched()

    job = watched.follow(proxy, client, finished_job.id)

    assert job.status == "succeeded"
    assert watched.ids == story(client, job.id)
    assert len(proxy.seen("/stream")) == 3


def test_polling_follows_a_running_job(
    proxy: Proxy, client: openai.OpenAI, long_job: FineTuningJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "POLL_S", 0.2)
    proxy.refused = "/stream"
    watched = Watched()
    threading.Timer(1.0, client.fine_tuning.jobs.cancel, [long_job.id]).start()

    job = watched.follow(proxy, client, long_job.id)

    assert job.status == "cancelled"
    assert watched.ids == story(client, job.id)


def test_a_service_that_stays_away_is_given_up_in_time(
    live: Live, client: openai.OpenAI, long_job: FineTuningJob
) -> None:
    watched = Watched()
    with Proxy(live.port) as proxy:
        threading.Timer(0.5, proxy.stop).start()
        started = time.monotonic()

        with pytest.raises(Ending) as ending:
            watched.follow(proxy, client, long_job.id, patience_s=1.5)

    assert ending.value.code is ExitCode.UNREACHABLE
    assert f"nibble jobs watch {long_job.id}" in ending.value.message
    assert time.monotonic() - started > 1.5
    assert len(watched.troubles) == 1
    assert client.fine_tuning.jobs.retrieve(long_job.id).status not in ("cancelled", "failed")
