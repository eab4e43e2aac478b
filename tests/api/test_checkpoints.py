"""A job's checkpoints, through the official SDK."""

import re

import pytest
from openai import OpenAI

from tests.hand_worker import HandWorker


@pytest.fixture
def job_id(client: OpenAI, training_file: str) -> str:
    job = client.fine_tuning.jobs.create(
        model="tiny-llama", training_file=training_file, suffix="mine"
    )
    return job.id


@pytest.fixture
def strict(base_url: str, key: str) -> OpenAI:
    return OpenAI(base_url=f"{base_url}/v1", api_key=key, _strict_response_validation=True)


def test_a_checkpoint_says_what_was_measured_and_fits_the_sdks_strict_models(
    strict: OpenAI, job_id: str, worker: HandWorker
) -> None:
    run = worker.start()
    worker.checkpoint(
        run, 5, train_loss=0.5, full_valid_loss=float("nan"), valid_loss=None, unknown=1
    )

    (checkpoint,) = strict.fine_tuning.jobs.checkpoints.list(job_id).data

    assert checkpoint.id.startswith("ftckpt_")
    assert checkpoint.object == "fine_tuning.job.checkpoint"
    assert checkpoint.fine_tuning_job_id == job_id
    assert checkpoint.step_number == 5
    assert re.fullmatch(
        r"ft:tiny-llama:org-nibble:mine:\w{8}:ckpt-step-5", checkpoint.fine_tuned_model_checkpoint
    )
    assert checkpoint.metrics.to_dict() == {
        "step": 5.0,
        "train_loss": 0.5,
        "train_mean_token_accuracy": None,
        "valid_loss": None,
        "valid_mean_token_accuracy": None,
        "full_valid_loss": None,
        "full_valid_mean_token_accuracy": None,
    }


def test_checkpoints_are_listed_latest_first_in_pages(
    strict: OpenAI, job_id: str, worker: HandWorker
) -> None:
    run = worker.start()
    made = [worker.checkpoint(run, step).id for step in (3, 6, 9)]

    page = strict.fine_tuning.jobs.checkpoints.list(job_id, limit=2)
    every = [checkpoint.id for checkpoint in strict.fine_tuning.jobs.checkpoints.list(job_id)]

    assert [checkpoint.id for checkpoint in page.data] == [made[2], made[1]]
    assert page.has_more
    raw = page.to_dict()
    assert (raw["first_id"], raw["last_id"]) == (made[2], made[1])
    assert every == made[::-1]


def test_a_job_without_checkpoints_has_an_empty_page(strict: OpenAI, job_id: str) -> None:
    page = strict.fine_tuning.jobs.checkpoints.list(job_id, limit=0, after="ftckpt_unknown")

    assert (page.data, page.has_more) == ([], False)
    assert page.to_dict()["first_id"] is None
