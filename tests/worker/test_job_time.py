"""What a chat template takes for the present: the time of the job, in its validation and in every attempt."""

import datetime as dt
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from qlora_core.text import TextEncoder, check_dataset
from service.tables import Job
from tests.tiny_models import CHAT_TEMPLATE, save_tiny_llama, save_tiny_tokenizer
from tests.worker.conftest import chat_lines
from worker.crew import Crew

YEAR = 2001
IN_THAT_YEAR = (
    "{% if strftime_now('%Y') == '" + str(YEAR) + "' %}"
    "{{ '<|im_start|>system\nIt is long ago.<|im_end|>\n' }}"
    "{% endif %}"
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama whose template writes more in one year than in others."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")
    return save_tiny_tokenizer(folder, chat_template=IN_THAT_YEAR + CHAT_TEMPLATE)


def test_a_job_of_another_day_is_validated_and_trained_on_that_day(
    crew: Crew,
    submit: Callable[..., str],
    await_job: Callable[..., Job],
    session: Session,
    model_folder: Path,
    tmp_path: Path,
) -> None:
    created_at = dt.datetime(YEAR, 7, 1, tzinfo=dt.UTC)
    job_id = submit(chat_lines(12), hyperparameters={"n_epochs": 1})
    session.execute(update(Job).where(Job.id == job_id).values(created_at=created_at))
    session.commit()
    crew.ring("validate")

    job = await_job(job_id, "succeeded")

    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(chat_lines(12)))
    then, now = (
        check_dataset(
            path, TextEncoder.from_folder(model_folder, now=time), context_length=128
        ).n_tokens
        for time in (created_at.timestamp(), None)
    )
    assert then > now
    assert job.dataset_report is not None
    assert job.dataset_report["training_file"]["n_tokens"] == then
    assert job.trained_tokens == then
