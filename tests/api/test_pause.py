"""Pause and resume through the official SDK: the job as answered, and what is refused."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from operations.embedded.valkey import Valkey
from tests.hand_worker import HandWorker


@pytest.fixture
def strict(base_url: str, key: str) -> Iterator[OpenAI]:
    """The SDK, refusing every response that does not fit its models: their status has no `paused`."""
    with OpenAI(
        base_url=f"{base_url}/v1", api_key=key, max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


def create(client: OpenAI, training_file: str) -> str:
    return client.fine_tuning.jobs.create(model="tiny-llama", training_file=training_file).id


def extra(job: FineTuningJob, name: str) -> Any:
    assert job.model_extra is not None
    return job.model_extra[name]


def test_a_queued_job_is_paused_at_once_and_resumed_into_the_queue(
    strict: OpenAI, training_file: str, worker: HandWorker, valkey_server: Valkey
) -> None:
    job_id = create(strict, training_file)
    worker.validate()
    with valkey_server.client() as broker:
        broker.flushall()

    paused = strict.fine_tuning.jobs.pause(job_id)
    resumed = strict.fine_tuning.jobs.resume(job_id)

    assert (paused.status, paused.finished_at) == ("queued", None)
    assert extra(paused, "paused_at") >= paused.created_at
    assert extra(paused, "pause_requested") is False
    assert extra(paused, "is_terminal") is False
    assert resumed.status == "queued"
    assert extra(resumed, "paused_at") is None
    with valkey_server.client() as broker:
        assert broker.llen("nibble:train") == 1  # a worker is woken, once it can find the row


def test_a_job_at_work_is_running_until_its_worker_has_stopped(
    strict: OpenAI, training_file: str, worker: HandWorker
) -> None:
    job_id = create(strict, training_file)
    run = worker.start()

    asked = strict.fine_tuning.jobs.pause(job_id)
    worker.stopped(run)
    paused = strict.fine_tuning.jobs.retrieve(job_id)
    listed = strict.fine_tuning.jobs.list().data[0]

    assert asked.status == "running"
    assert (extra(asked, "pause_requested"), extra(asked, "paused_at")) == (True, None)
    assert paused.status == listed.status == "queued"
    assert extra(paused, "pause_requested") is False
    assert extra(paused, "paused_at") == extra(listed, "paused_at") is not None


@pytest.mark.parametrize("what", ["pause", "resume"])
def test_a_job_that_has_ended_is_refused(
    client: OpenAI, training_file: str, worker: HandWorker, what: str
) -> None:
    job_id = create(client, training_file)
    worker.succeed(worker.start())

    with pytest.raises(openai.BadRequestError, match="has already succeeded") as refusal:
        getattr(client.fine_tuning.jobs, what)(job_id)

    assert refusal.value.code == "job_already_ended"


@pytest.mark.parametrize("what", ["pause", "resume"])
def test_another_projects_job_does_not_exist(
    client: OpenAI, other_team: OpenAI, training_file: str, what: str
) -> None:
    job_id = create(client, training_file)

    with pytest.raises(openai.NotFoundError, match="No such fine-tuning job"):
        getattr(other_team.fine_tuning.jobs, what)(job_id)
