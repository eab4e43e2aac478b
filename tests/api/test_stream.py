"""The event stream over real sockets: replay, live, resumed, silent, ended, and left."""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import OpenAI
from sqlalchemy import Engine, text

from api import streaming
from service.events import feed
from service.events.actions import NewEvent
from service.settings import Settings
from tests.api.conftest import CHAT_LINE, run_process, serve, wait_until
from tests.hand_worker import HandWorker


@dataclass(frozen=True)
class Told:
    """A server-sent event as it came."""

    event: str
    data: dict[str, Any]
    id: str | None


@pytest.fixture
def job_id(client: OpenAI, training_file: str) -> str:
    return client.fine_tuning.jobs.create(model="tiny-llama", training_file=training_file).id


def listen(
    http: httpx2.Client, job_id: str, *, after: int | None = None, last: str | None = None
) -> Generator[Told]:
    """Yield a stream's events until it ends; comments are passed over."""
    headers = {} if last is None else {"last-event-id": last}
    params = {} if after is None else {"after": after}
    url = f"/v1/fine_tuning/jobs/{job_id}/stream"
    with http.stream("GET", url, headers=headers, params=params) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, str] = {}
        for line in answer.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif "data" in fields:
                data = json.loads(fields["data"])
                yield Told(fields["event"], data, fields.get("id"))
                fields = {}
            else:
                fields = {}


def connections(engine: Engine) -> dict[str, int]:
    """Count the database's connections by who made them."""
    with engine.connect() as connection:
        rows = connection.execute(
            text(
                "SELECT application_name, count(*) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid() GROUP BY 1"
            )
        )
        return {str(name): int(count) for name, count in rows.all()}


def test_an_ended_job_is_replayed_whole_and_then_the_stream_ends(
    client: OpenAI, http: httpx2.Client, job_id: str, worker: HandWorker
) -> None:
    run = worker.start()
    for step in range(1, 451):  # more than two batches
        worker.step(run, step, 450)
    worker.succeed(run, step=450)

    told = list(listen(http, job_id))

    listed = list(client.fine_tuning.jobs.list_events(job_id, limit=1000))[::-1]
    assert [t.data["id"] for t in told[:-1]] == [event.id for event in listed]
    assert [t.id for t in told[:-1]] == [str(n) for n in range(1, len(listed) + 1)]
    assert {t.event for t in told[:-1]} == {"message", "metrics"}
    assert told[4].data == listed[4].to_dict()
    done = told[-1]
    assert (done.event, done.id) == ("done", None)
    assert done.data["id"] == job_id
    assert done.data["status"] == "succeeded"
    assert done.data["trained_steps"] == 450


def test_a_stream_is_resumed_after_the_last_event_seen(
    http: httpx2.Client, job_id: str, worker: HandWorker
) -> None:
    worker.succeed(worker.start())

    by_header = listen(http, job_id, last="4")
    by_query = listen(http, job_id, after=4)
    by_both = listen(http, job_id, last="4", after=2)  # a browser, back at its first address

    for told in (by_header, by_query, by_both):
        assert [t.id for t in told] == ["5", "6", None]


def test_a_stream_resumed_at_its_end_says_done_at_once(
    http: httpx2.Client, job_id: str, client: OpenAI
) -> None:
    client.fine_tuning.jobs.cancel(job_id)

    told = list(listen(http, job_id, after=999_999))

    assert [t.event for t in told] == ["done"]
    assert told[0].data["status"] == "cancelled"


@pytest.fixture
def never_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams look when they are told to, and not by themselves after a while."""
    limits = {"heartbeat_s": 0.5, "poll_s": 600.0}
    monkeypatch.setattr(streaming.follow, "__kwdefaults__", limits)


@pytest.mark.usefixtures("never_by_itself")
def test_what_is_committed_is_told_because_of_the_commit(
    http: httpx2.Client, job_id: str, worker: HandWorker
) -> None:
    run = worker.start()
    told = listen(http, job_id, after=4)

    heard: list[int] = []
    for step in range(1, 11):
        worker.step(run, step)  # not before the one before was heard
        heard.append(next(told).data["data"]["step"])
    worker.succeed(run)

    assert heard == list(range(1, 11))
    assert [t.event for t in told][-1] == "done"


def test_every_stream_gets_every_event_once_and_in_order(
    http: httpx2.Client, job_id: str, worker: HandWorker
) -> None:
    run = worker.start()
    heard: list[list[str | None]] = []

    def hear() -> None:
        heard.append([t.id for t in listen(http, job_id)])

    listeners = [threading.Thread(target=hear) for _ in range(4)]
    for thread in listeners:
        thread.start()
    for step in range(1, 31):
        worker.step(run, step, 30)
    worker.succeed(run)
    for thread in listeners:
        thread.join()

    assert heard == [[*(str(n) for n in range(1, 37)), None]] * 4


def test_many_idle_streams_hold_one_connection_and_let_go_of_it(
    http: httpx2.Client, job_id: str, engine: Engine
) -> None:
    with contextlib.ExitStack() as streams:
        for _ in range(8):
            told = streams.enter_context(contextlib.closing(listen(http, job_id)))
            assert next(told).event == "message"
        # The listener connects beside them, and whoever looks at the table is through in a moment.
        wait_until(lambda: "nibble-events" in connections(engine))
        wait_until(lambda: connections_in_transaction(engine) == 0)
        with_streams = connections(engine)

    assert with_streams["nibble-events"] == 1
    wait_until(lambda: "nibble-events" not in connections(engine))


def connections_in_transaction(engine: Engine) -> int:
    with engine.connect() as connection:
        return connection.execute(
            text(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                " AND pid <> pg_backend_pid() AND state LIKE 'idle in transaction%'"
            )
        ).scalar_one()


@pytest.mark.usefixtures("never_by_itself")
def test_a_stream_outlives_its_listening_connection(
    http: httpx2.Client, job_id: str, worker: HandWorker, engine: Engine
) -> None:
    run = worker.start()
    told = listen(http, job_id, after=4)
    worker.step(run, 1)
    assert next(told).data["data"]["step"] == 1

    with engine.begin() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'nibble-events' AND datname = current_database()"
            )
        )
    worker.step(run, 2)
    second = next(told)
    told.close()

    assert second.data["data"]["step"] == 2


def test_a_silent_stream_says_that_it_is_there(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming.follow, "__kwdefaults__", {"heartbeat_s": 0.2, "poll_s": 10.0})
    with serve(settings) as url:
        key = settings.first_key_file.read_text().strip()
        client = OpenAI(base_url=f"{url}/v1", api_key=key)
        file = client.files.create(file=("t.jsonl", b'{"messages": []}\n'), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model="tiny-llama", training_file=file.id)
        headers = {"authorization": f"Bearer {key}"}
        path = f"{url}/v1/fine_tuning/jobs/{job.id}/stream"

        with httpx2.stream("GET", path, headers=headers) as answer:
            lines = answer.iter_lines()
            comments = [line for line in (next(lines) for _ in range(14)) if line.startswith(":")]

        client.close()
    assert comments
    assert set(comments) == {": still here"}


def test_too_many_streams_are_refused_with_a_503(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed.Feed.__init__, "__kwdefaults__", {"max_waiting": 1})
    with serve(settings) as url:
        key = settings.first_key_file.read_text().strip()
        client = OpenAI(base_url=f"{url}/v1", api_key=key)
        file = client.files.create(file=("t.jsonl", b'{"messages": []}\n'), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model="tiny-llama", training_file=file.id)
        http = httpx2.Client(base_url=url, headers={"authorization": f"Bearer {key}"})

        with contextlib.closing(listen(http, job.id)) as told:
            next(told)
            refused = http.get(f"/v1/fine_tuning/jobs/{job.id}/stream")

        wait_until(lambda: http.get(f"/v1/fine_tuning/jobs/{job.id}/events").status_code == 200)
        http.close()
        client.close()
    assert refused.status_code == 503
    assert "retry-after" in refused.headers
    assert "1 streams are open" in refused.json()["error"]["message"]


def test_an_id_that_is_none_of_the_streams_is_refused(http: httpx2.Client, job_id: str) -> None:
    for last in ("x", "-1", "1.5", "²", "9" * 30, "0" * 20 + "9" * 30, "9" * 5_000, "0" * 5_000):
        answer = http.get(
            f"/v1/fine_tuning/jobs/{job_id}/stream",
            headers=[(b"last-event-id", last.encode("latin-1"))],
        )

        assert answer.status_code == 400, last
        assert answer.json()["error"]["param"] == "Last-Event-ID"


def test_another_projects_stream_does_not_exist(
    other_team: OpenAI, base_url: str, job_id: str
) -> None:
    answer = httpx2.get(
        f"{base_url}/v1/fine_tuning/jobs/{job_id}/stream",
        headers={"authorization": f"Bearer {other_team.api_key}"},
    )

    assert answer.status_code == 404


def test_a_message_with_line_breaks_stays_one_event(
    http: httpx2.Client, job_id: str, worker: HandWorker, client: OpenAI
) -> None:
    run = worker.start()
    message = "one\n\ndata: two\r\nid: 7\revent: done\u2028"
    worker.tell(run, NewEvent(message))
    worker.fail(run)

    told = list(listen(http, job_id, after=4))

    assert [t.data.get("message") for t in told[:-1]] == [message, "The loss is not a number."]
    assert told[-1].event == "done"


def test_an_open_stream_ends_at_once_when_the_server_stops(
    settings: Settings, tmp_path: Path
) -> None:
    with run_process(settings, tmp_path / "api.log") as api:
        key = settings.first_key_file.read_text().strip()
        http = httpx2.Client(base_url=api.url, headers={"authorization": f"Bearer {key}"})
        with OpenAI(base_url=f"{api.url}/v1", api_key=key) as client:
            file = client.files.create(file=("t.jsonl", CHAT_LINE), purpose="fine-tune")
            job = client.fine_tuning.jobs.create(model="tiny-llama", training_file=file.id)
        told = listen(http, job.id)
        next(told)

        os.kill(api.pid, signal.SIGTERM)
        # A clean end, without `done`: the client comes back. One that waits is cut off, which raises.
        rest = list(told)
        http.close()

    assert rest == []
