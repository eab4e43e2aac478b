"""The queue and the workers over HTTP: one's own jobs, of others' only how many."""

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from openai import OpenAI
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from service.db import transaction
from service.queue.workers import WorkerSlots, sign_in
from service.settings import Settings
from tests.hand_worker import HandWorker

GIB = 1 << 30
CARD: dict[str, Any] = {
    "name": "H200",
    "memory_bytes": 24 * GIB,
    "free_memory_bytes": 20 * GIB,
    "driver": "570.1",
}


@pytest.fixture
def card(sessions: sessionmaker[Session]) -> str:
    with transaction(sessions) as session:
        slots = WorkerSlots(train=1, validate=1, devices=[CARD])
        sign_in(session, worker_id="worker_card", host="rack-1", pid=1, slots=slots)
    return "worker_card"


@pytest.fixture
def strict(base_url: str, key: str) -> Iterator[OpenAI]:
    """The SDK, refusing every response that does not fit its models."""
    with OpenAI(
        base_url=f"{base_url}/v1", api_key=key, max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


def create(client: OpenAI, training_file: str) -> str:
    return client.fine_tuning.jobs.create(model="tiny-llama", training_file=training_file).id


def need(sessions: sessionmaker[Session], job_id: str, count: int) -> None:
    with transaction(sessions) as session:
        session.execute(
            text("UPDATE jobs SET memory_needed_bytes = :n WHERE id = :id"),
            {"n": count, "id": job_id},
        )


def test_a_waiting_job_says_its_place_and_when_it_should_start(
    strict: OpenAI, training_file: str, worker: HandWorker, card: str
) -> None:
    first, second = create(strict, training_file), create(strict, training_file)
    new = strict.fine_tuning.jobs.retrieve(second).model_extra
    worker.validate()
    worker.validate()

    found = [strict.fine_tuning.jobs.retrieve(job_id).model_extra for job_id in (first, second)]
    listed = {job.id: job.model_extra for job in strict.fine_tuning.jobs.list()}

    assert new is not None
    assert (new["queue_position"], new["expected_start"]) == (None, None)
    assert [one and one["queue_position"] for one in found] == [1, 2]
    assert found[0] is not None
    assert found[0]["expected_start"] is not None
    assert found[1] is not None
    assert found[1]["expected_start"] is None
    assert found[1]["waits_because"] is None
    one = listed[second]
    assert one is not None
    assert one["queue_position"] == 2


def test_a_job_that_fits_no_worker_says_what_would_fit_and_waits(
    strict: OpenAI,
    training_file: str,
    worker: HandWorker,
    card: str,
    sessions: sessionmaker[Session],
) -> None:
    job_id = create(strict, training_file)
    worker.validate()
    need(sessions, job_id, 40 * GIB)

    job = strict.fine_tuning.jobs.retrieve(job_id)

    assert job.status == "queued"
    assert job.model_extra is not None
    assert job.model_extra["memory_needed_bytes"] == 40 * GIB
    assert job.model_extra["expected_start"] is None
    assert "needs a GPU with 41.0 GiB" in job.model_extra["waits_because"]


def test_the_queue_shows_ones_own_jobs_and_counts_the_others(
    client: OpenAI,
    http: httpx2.Client,
    training_file: str,
    worker: HandWorker,
    other_team: OpenAI,
) -> None:
    waiting, checked = create(client, training_file), create(client, training_file)
    worker.validate()

    mine = http.get("/v1/fine_tuning/queue").json()
    cut = http.get("/v1/fine_tuning/queue", params={"limit": 1}).json()
    theirs: Any = other_team.get("/fine_tuning/queue", cast_to=object)

    assert [(job["id"], job["status"], job["queue_position"]) for job in mine["data"]] == [
        (waiting, "queued", 1),
        (checked, "validating_files", None),
    ]
    nothing = {"validating_files": 0, "queued": 0, "running": 0, "paused": 0}
    assert mine["own"] == nothing | {"validating_files": 1, "queued": 1}
    assert mine["others"] == nothing
    assert (len(cut["data"]), cut["has_more"], mine["has_more"]) == (1, True, False)
    assert theirs["data"] == []
    assert (theirs["own"], theirs["others"]) == (nothing, mine["own"])


def test_workers_are_listed_with_their_gpus_and_whose_jobs_they_do(
    client: OpenAI,
    http: httpx2.Client,
    training_file: str,
    card: str,
    other_team: OpenAI,
    sessions: sessionmaker[Session],
) -> None:
    job_id = create(client, training_file)
    with transaction(sessions) as session:
        session.execute(text("UPDATE jobs SET lease_owner = :w, attempt_no = 1"), {"w": card})

    (mine,) = http.get("/v1/fine_tuning/workers").json()["data"]
    seen: Any = other_team.get("/fine_tuning/workers", cast_to=object)
    (theirs,) = seen["data"]

    assert (mine["id"], mine["host"], mine["status"]) == (card, "rack-1", "online")
    assert mine["devices"] == [CARD]
    assert (mine["training"], mine["validating"], mine["jobs"]) == (0, 1, [job_id])
    assert (theirs["validating"], theirs["jobs"]) == (1, [])


def test_a_worker_that_is_silent_for_longer_than_a_lease_is_lost(
    http: httpx2.Client, card: str, sessions: sessionmaker[Session], settings: Settings
) -> None:
    with transaction(sessions) as session:
        session.execute(
            text("UPDATE workers SET seen_at = now() - make_interval(secs => :s)"),
            {"s": settings.lease_s + 1},
        )

    (lost,) = http.get("/v1/fine_tuning/workers").json()["data"]

    assert lost["status"] == "lost"


def test_a_queue_of_no_jobs_cannot_be_asked_for(http: httpx2.Client) -> None:
    answer = http.get("/v1/fine_tuning/queue", params={"limit": 0})

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "limit"
