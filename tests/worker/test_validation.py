import json
from collections.abc import Callable
from typing import Any

import pytest

from service.settings import Settings
from service.tables import Event, Job
from tests.worker.conftest import chat_lines
from worker.crew import Crew

Submit = Callable[..., str]
Await = Callable[..., Job]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Nobody trains: no child gets ready for it, and a validated job stays queued."""
    return settings.model_copy(update={"train_slots": 0})


def test_good_files_are_counted_and_every_auto_becomes_a_number(
    crew: Crew, submit: Submit, await_job: Await
) -> None:
    job_id = submit(chat_lines(12), chat_lines(3), hyperparameters={"batch_size": 4})
    crew.ring("validate")

    job = await_job(job_id, "queued")

    assert job.dataset_report is not None
    assert job.dataset_report["training_file"]["n_examples"] == 12
    assert job.dataset_report["validation_file"]["n_examples"] == 3
    assert job.hyperparameters["batch_size"] == 4
    assert job.hyperparameters["n_epochs"] == 8  # OpenAI's rule: 100 // 12
    assert job.hyperparameters["context_length"] == 128  # the model's own
    assert "auto" not in job.hyperparameters.values()
    assert job.memory_needed_bytes is not None
    assert 10_000 < job.memory_needed_bytes < 100_000_000  # a tiny model's


def test_long_examples_are_cut_and_counted_aloud(
    crew: Crew, submit: Submit, await_job: Await, story: Callable[[str], list[Event]]
) -> None:
    job_id = submit([*chat_lines(11), *chat_lines(2, words=200)])
    crew.ring("validate")

    job = await_job(job_id, "queued")

    assert job.dataset_report is not None
    assert job.dataset_report["training_file"]["n_truncated"] == 2
    warnings = [event for event in story(job_id) if event.level == "warn"]
    assert [event.data["kind"] for event in warnings if event.data] == ["truncated"]


def test_a_sample_prompt_that_cannot_be_asked_fails_the_validation_by_its_name(
    crew: Crew, submit: Submit, await_job: Await
) -> None:
    job_id = submit(chat_lines(12), sample_prompts=["What is a nibble?", "<|im_end|>"])
    crew.ring("validate")

    job = await_job(job_id, "failed")

    assert job.error is not None
    assert (job.error["code"], job.error["param"]) == ("invalid_sample_prompt", "sample_prompts[1]")
    assert (job.attempt_no, job.trained_tokens) == (1, None)


HALF = "\ud800"  # of a surrogate pair: JSON can write it, UTF-8 cannot


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": HALF, "content": "a"}, "messages[0].role"),
        ({"role": "user", "content": "a", "weight": HALF}, "messages[0].weight"),
        ({"role": "user", "content": [{"type": HALF}]}, "messages[0].content[0]"),
        ({"role": "user", "content": "a", HALF: 1}, "messages[0].\\ud800"),
    ],
    ids=["role", "weight", "part type", "field name"],
)
def test_half_a_character_is_quoted_and_its_line_named(
    crew: Crew, submit: Submit, await_job: Await, message: dict[str, Any], field: str
) -> None:
    bad = json.dumps({"messages": [message, {"role": "assistant", "content": "b"}]})
    job_id = submit([*chat_lines(12), bad])
    crew.ring("validate")

    job = await_job(job_id, "failed")

    assert job.error is not None
    assert (job.error["code"], job.error["param"]) == ("invalid_training_file", "training_file")
    assert "Example 13" in job.error["message"]
    assert "\\ud800" in job.error["message"]
    assert job.dataset_report is not None
    assert job.dataset_report["training_file"]["errors"][0]["field"] == field


def test_a_disk_that_takes_no_folder_costs_attempts_and_not_their_leases(
    crew: Crew, submit: Submit, await_job: Await
) -> None:
    crew.context.settings.attempts_dir.write_bytes(b"")  # a file in the folders' place
    job_id = submit(chat_lines(12))
    crew.ring("validate")

    job = await_job(job_id, "failed")

    assert job.error is not None
    assert job.error["code"] == "worker_lost"
    assert "could not be read or written: Not a directory" in job.error["message"]
    assert str(crew.context.settings.data_dir) not in job.error["message"]


def test_a_file_whose_bytes_are_gone_fails_the_job_by_name(
    crew: Crew, submit: Submit, await_job: Await
) -> None:
    job_id = submit(chat_lines(12))
    for blob in (crew.context.settings.data_dir / "blobs" / "files").iterdir():
        blob.unlink()
    crew.ring("validate")

    job = await_job(job_id, "failed")

    assert job.error is not None
    assert (job.error["code"], job.error["param"]) == ("file_not_found", "training_file")
