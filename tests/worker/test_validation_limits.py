from collections.abc import Callable

import pytest

from service.settings import Settings
from service.tables import Job
from tests.worker.conftest import chat_lines
from worker.crew import Crew

Submit = Callable[..., str]
Await = Callable[..., Job]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """A second is all there is, and nobody trains."""
    return settings.model_copy(update={"validate_time_s": 1, "train_slots": 0})


def test_a_check_that_takes_too_long_is_ended_with_the_reason(
    crew: Crew, submit: Submit, await_job: Await
) -> None:
    job_id = submit(chat_lines(200_000))  # many times more than a second's work
    crew.ring("validate")

    job = await_job(job_id, "failed")

    assert job.error is not None
    assert job.error["code"] == "validation_timeout"
