"""What a worker says of itself, and what it does where it cannot train."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from service.db import transaction
from service.settings import Settings
from service.tables import Job, Worker
from tests.worker.conftest import chat_lines
from worker import slot
from worker.crew import Crew

Submit = Callable[..., str]
Await = Callable[..., Job]


def signed_in(sessions: sessionmaker[Session], worker_id: str) -> Worker:
    deadline = time.monotonic() + 90
    while True:
        with transaction(sessions) as session:
            worker = session.scalars(select(Worker).where(Worker.id == worker_id)).one_or_none()
        if worker is not None:
            return worker
        assert time.monotonic() < deadline, "the worker has not signed in"
        time.sleep(0.05)


def test_a_worker_signs_in_with_its_slots_and_signs_out(
    settings: Settings, sessions: sessionmaker[Session]
) -> None:
    crew = Crew(settings.model_copy(update={"train_slots": 0, "validate_slots": 2}))
    crew.start()

    there = signed_in(sessions, crew.context.worker_id)
    crew.stop()

    assert (there.slots["train"], there.slots["validate"]) == (0, 2)
    assert there.stopped_at is None
    assert signed_in(sessions, crew.context.worker_id).stopped_at is not None
    assert not list((settings.data_dir / "workers").rglob("*.lock"))


def test_a_machine_without_the_engine_validates_and_leaves_training_to_others(
    settings: Settings,
    submit: Submit,
    await_job: Await,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slot, "find_spec", lambda _: None)
    crew = Crew(settings)
    crew.start()
    job_id = submit(chat_lines(12))
    crew.ring("validate")

    await_job(job_id, "queued")
    crew.ring("train")
    time.sleep(0.5)
    job = await_job(job_id, "queued")
    crew.stop()

    assert job.lease_owner is None
    assert [s.problem for s in crew.slots if s.kind == "train"] == [slot.ENGINE_MISSING]


def test_wrong_settings_end_the_worker_with_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "worker"],
        env={"NIBBLE_DATA_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 1
    assert "NIBBLE_DATABASE_URL is not set" in done.stderr
    assert "Traceback" not in done.stderr
