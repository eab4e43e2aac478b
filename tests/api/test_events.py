"""A job's events in pages, through the official SDK."""

import httpx2
import pytest
from openai import OpenAI

from service.events.actions import NewEvent
from tests.hand_worker import HandWorker


@pytest.fixture
def job_id(client: OpenAI, training_file: str) -> str:
    return client.fine_tuning.jobs.create(model="tiny-llama", training_file=training_file).id


def test_a_whole_story_is_told_in_openais_words_newest_first(
    base_url: str, key: str, job_id: str, training_file: str, worker: HandWorker
) -> None:
    run = worker.start()
    worker.step(run, 1)
    checkpoint = worker.checkpoint(run, 1)
    worker.succeed(run)

    with OpenAI(base_url=f"{base_url}/v1", api_key=key, _strict_response_validation=True) as strict:
        told = list(strict.fine_tuning.jobs.list_events(job_id, limit=3))
        job = strict.fine_tuning.jobs.retrieve(job_id)

    assert [event.message for event in reversed(told)] == [
        f"Created fine-tuning job: {job_id}",
        f"Validating training file: {training_file}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Step 1/10: training loss=1.00",
        f"Checkpoint created at step 1 with Snapshot ID: {checkpoint.name}",
        f"New fine-tuned model created: {job.fine_tuned_model}",
        "The job has successfully completed",
    ]
    assert {event.object for event in told} == {"fine_tuning.job.event"}
    assert all(event.id.startswith("ftevent-") for event in told)
    metrics = next(event for event in told if event.type == "metrics")
    assert metrics.data == {"step": 1, "total_steps": 10, "train_loss": 1.0}
    assert [event.to_dict()["seq"] for event in told] == list(range(8, 0, -1))


def test_odd_pages_are_answered_all_the_same(client: OpenAI, job_id: str) -> None:
    none_asked = client.fine_tuning.jobs.list_events(job_id, limit=0)
    unknown = client.fine_tuning.jobs.list_events(job_id, after="ftevent-unknown")
    many = client.fine_tuning.jobs.list_events(job_id, limit=10**12)

    assert none_asked.data == []
    assert (unknown.data, unknown.has_more) == ([], False)
    assert len(many.data) == 1


def test_an_event_of_another_job_is_no_place_to_go_on_from(
    client: OpenAI, training_file: str, job_id: str
) -> None:
    other = client.fine_tuning.jobs.create(model="tiny-llama", training_file=training_file).id
    foreign = client.fine_tuning.jobs.list_events(other).data[0].id

    assert client.fine_tuning.jobs.list_events(job_id, after=foreign).data == []


def test_what_json_cannot_hold_reaches_the_reader_mended(
    http: httpx2.Client, job_id: str, worker: HandWorker
) -> None:
    run = worker.start()

    worker.step(run, 1, train_loss=float("nan"), grad_norm=float("inf"))
    worker.tell(run, NewEvent("half \ud800 and nul \0", data={"\0": ["\udfff", {"x": "\0"}]}))

    told = http.get(f"/v1/fine_tuning/jobs/{job_id}/events", params={"limit": 2}).json()["data"]
    assert told[0]["message"] == "half \ufffd and nul \ufffd"
    assert told[0]["data"] == {"\ufffd": ["\ufffd", {"x": "\ufffd"}]}
    assert told[1]["data"]["train_loss"] is None
    assert told[1]["data"]["grad_norm"] is None
