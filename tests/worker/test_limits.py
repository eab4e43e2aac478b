"""Real training children at their limits of time, memory and disk: the job fails with the code, and says what it was."""

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from sqlalchemy.orm import Session, sessionmaker

from service.settings import Settings
from service.tables import Event
from tests.worker.conftest import (
    Await,
    Submit,
    chat_lines,
    steps_done,
    training_child,
    wait_until,
)
from worker.crew import Crew
from worker.room import check_room

Story = Callable[[str], list[Event]]

LIMIT = 16 << 30
LONG = {"n_epochs": 50, "batch_size": 1}  # of 2,000 examples that no machine trains during a test


def test_a_job_that_trains_longer_than_it_wished_fails_with_what_it_has_told_kept(
    crew: Crew, submit: Submit, await_job: Await, story: Story
) -> None:
    job_id = submit(chat_lines(2000, words=25), hyperparameters=LONG | {"max_time_s": 6})
    crew.ring("validate")

    job = await_job(job_id, "failed")

    assert job.error is not None
    assert job.error["code"] == "time_limit"
    assert "6 seconds that max_time_s allows" in job.error["message"]
    assert (job.attempt_no, job.lost_attempts) == (2, 0)


class TestTheServicesTimeLimit:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"train_time_s": 1})

    def test_counts_where_it_is_the_shorter_one(
        self, crew: Crew, submit: Submit, await_job: Await
    ) -> None:
        job_id = submit(chat_lines(2000, words=25), hyperparameters=LONG | {"max_time_s": 900})
        crew.ring("validate")

        job = await_job(job_id, "failed")

        assert job.error is not None
        assert job.error["code"] == "time_limit"
        assert "1 seconds that NIBBLE_TRAIN_TIME_S allows" in job.error["message"]


class TestTheMemoryLimit:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"train_memory_bytes": LIMIT})

    def test_is_the_training_processs_own(
        self, crew: Crew, submit: Submit, sessions: sessionmaker[Session]
    ) -> None:
        job_id = submit(chat_lines(2000, words=25), hyperparameters=LONG)
        crew.ring("validate")

        child = training_child(sessions, job_id)

        wait_until(lambda: child.rlimit(psutil.RLIMIT_DATA) == (LIMIT, LIMIT))
        wait_until(lambda: steps_done(crew, job_id) > 0)


def test_a_training_that_is_refused_shows_the_logs_end_without_this_machines_folders(
    crew: Crew, submit: Submit, await_job: Await
) -> None:
    job_id = submit(chat_lines(12), hyperparameters={"lora_target_modules": ["nonsense"]})
    crew.ring("validate")

    job = await_job(job_id, "failed")

    assert job.error is not None
    assert job.error["code"] == "invalid_lora_target_modules"
    assert 'File "<nibble>/worker/child/' in job.error["log_tail"]
    assert job.error["log_tail"].endswith(job.error["message"])
    assert str(Path(__file__).parents[2]) not in str(job.error)


class TestAFullDisk:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        """What has to stay free is more than any disk has."""
        return settings.model_copy(update={"min_free_bytes": 1 << 60})

    def test_fails_a_job_before_it_begins(
        self, crew: Crew, submit: Submit, await_job: Await
    ) -> None:
        job_id = submit(chat_lines(12))
        crew.ring("validate")

        job = await_job(job_id, "failed")

        assert job.error is not None
        assert job.error["code"] == "disk_full"
        assert f"keeps {1 << 60:,} of them back" in job.error["message"]


def test_room_is_asked_for_what_is_needed_beside_what_is_kept_free(tmp_path: Path) -> None:
    check_room(tmp_path, needed_bytes=1, kept_free_bytes=0)

    with pytest.raises(OSError, match=f"needs up to {1 << 60:,} bytes"):
        check_room(tmp_path, needed_bytes=1 << 60, kept_free_bytes=0)
