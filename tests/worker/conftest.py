"""A base model, jobs over real files, and a crew of slots, for tests of the worker."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from service.db import transaction
from service.files.actions import register_produced
from service.ids import new_id
from service.jobs import actions as jobs
from service.jobs.fingerprint import Fingerprint
from service.jobs.spec import CreateJob
from service.keys.actions import Caller
from service.models.catalog import Catalog
from service.settings import Settings
from service.storage import Storage
from service.tables import DEFAULT_PROJECT, Attempt, Event, Job
from tests.tiny_models import save_tiny_llama
from worker import spawn
from worker.crew import Crew

Submit = Callable[..., str]
Await = Callable[..., Job]


def chat_lines(n: int, *, words: int = 4) -> list[str]:
    """Good training lines."""
    return [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"What is {i}?"},
                    {"role": "assistant", "content": f"It is {i}, " + "a nibble " * words},
                ]
            }
        )
        for i in range(n)
    ]


def wait_until(what: Callable[[], object]) -> None:
    """Wait until `what` holds, also on a slow machine."""
    deadline = time.monotonic() + 90
    while not what():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.03)


def steps_done(crew: Crew, job_id: str) -> int:
    """How many steps its child says it has done, told or not."""
    events = crew.context.folder(job_id, 2).events
    whole, _, _ = (events.read_text("utf-8") if events.exists() else "").rpartition("\n")
    return sum(json.loads(line)["type"] == "metrics" for line in whole.splitlines())


def training_child(sessions: sessionmaker[Session], job_id: str) -> psutil.Process:
    """The child of the job's second attempt, which is its first to train."""

    def noted_pid() -> int | None:
        with sessions() as session:
            attempt = session.get(Attempt, (job_id, 2))
            return None if attempt is None else attempt.pid

    wait_until(noted_pid)
    pid = noted_pid()
    assert pid is not None
    return psutil.Process(pid)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    return save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def settings(settings: Settings, model_folder: Path, tmp_path: Path) -> Settings:
    """The usual settings, with a catalog that has the tiny model."""
    catalog = tmp_path / "models.toml"
    catalog.write_text(f'[models.tiny]\npath = "{model_folder}"\n', encoding="utf-8")
    return settings.model_copy(update={"models_file": catalog})


@pytest.fixture
def caller(sessions: sessionmaker[Session]) -> Caller:
    """Who submits."""
    return Caller(project_id=DEFAULT_PROJECT, key_id="key_test")


@pytest.fixture
def submit(
    settings: Settings, sessions: sessionmaker[Session], caller: Caller, tmp_path: Path
) -> Submit:
    """Store files, create a job over them as the API would, and return its id."""
    storage = Storage.open(settings)
    catalog = Catalog.load(settings.models_file)

    def store(session: Session, lines: Sequence[str] | bytes) -> str:
        content = lines if isinstance(lines, bytes) else "\n".join(lines).encode()
        key = f"files/{new_id('file-')}"
        path = tmp_path / "upload.jsonl"
        path.write_bytes(content)
        storage.put_file(key, path)
        return register_produced(
            session, DEFAULT_PROJECT, "train.jsonl", "fine-tune", key, len(content), "0" * 64
        ).id

    def submit_job(
        lines: Sequence[str] | bytes,
        validation: Sequence[str] | bytes | None = None,
        **body: Any,
    ) -> str:
        with transaction(sessions) as session:
            spec = {
                "model": "tiny",
                "training_file": store(session, lines),
                "validation_file": None if validation is None else store(session, validation),
                **body,
            }
            job = jobs.create(
                session,
                catalog,
                settings,
                caller,
                CreateJob.model_validate(spec),
                Fingerprint(new_id("req_")),
            )
            return job.id

    return submit_job


@pytest.fixture
def crew(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    """A worker's slots in this process, with real children; no Celery, so it must be rung or it polls."""
    monkeypatch.setattr(spawn, "_CLOSE_S", 0.1)  # at the end the spare child still imports torch
    crew = Crew(settings)
    crew.start()
    yield crew
    crew.stop()


@pytest.fixture
def await_job(sessions: sessionmaker[Session]) -> Await:
    """Wait until a job is in one of some statuses (the ended ones), and return it."""

    def wait(
        job_id: str,
        *statuses: str,
        until: Callable[[Job], bool] | None = None,
        timeout_s: float = 90,
    ) -> Job:
        wanted = statuses or ("succeeded", "failed", "cancelled")
        deadline = time.monotonic() + timeout_s
        while True:
            with sessions() as session:
                job = session.get_one(Job, job_id)
                if until(job) if until is not None else job.status in wanted:
                    return job
                if job.finished_at is not None or time.monotonic() > deadline:
                    told = session.scalars(
                        select(Event.message).where(Event.job_id == job_id).order_by(Event.seq)
                    ).all()
                    pytest.fail(f"{job_id} is {job.status}, {job.error}: {told}")
            time.sleep(0.05)

    return wait


@pytest.fixture
def story(sessions: sessionmaker[Session]) -> Callable[[str], list[Event]]:
    """Return a job's events in order."""

    def read(job_id: str) -> list[Event]:
        with sessions() as session:
            statement = select(Event).where(Event.job_id == job_id).order_by(Event.seq)
            return list(session.scalars(statement))

    return read
