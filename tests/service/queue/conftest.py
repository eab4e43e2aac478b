"""Job rows as the API would have made them, for tests of the queue alone."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.orm import Session, sessionmaker

from service import clock
from service.db import transaction
from service.ids import new_id
from service.queue.claim import Claim, claim
from service.tables import DEFAULT_PROJECT, File, Job, Project

MakeJob = Callable[..., str]
MakeClaim = Callable[..., Claim | None]


@pytest.fixture
def make_job(sessions: sessionmaker[Session]) -> MakeJob:
    """Insert a job and return its id; each is a second younger than the one before."""
    made = 0

    def make(*, status: str = "queued", project_id: str = DEFAULT_PROJECT, **columns: Any) -> str:
        nonlocal made
        made += 1
        job_id, file_id = new_id("ftjob-"), new_id("file-")
        with transaction(sessions) as session:
            if session.get(Project, project_id) is None:
                session.add(Project(id=project_id, name=project_id, created_at=clock.now()))
                session.flush()
            session.add(
                File(
                    id=file_id,
                    project_id=project_id,
                    filename="train.jsonl",
                    purpose="fine-tune",
                    bytes=1,
                    sha256="0" * 64,
                    blob_key=file_id,
                    created_at=clock.now(),
                )
            )
            session.flush()
            row: dict[str, Any] = {
                "id": job_id,
                "project_id": project_id,
                "created_at": clock.now() + timedelta(seconds=made),
                "status": status,
                "model": "tiny",
                "training_file": file_id,
                "seed": 0,
                "spec": {},
                "hyperparameters": {},
            }
            session.add(Job(**(row | columns)))
        return job_id

    return make


@pytest.fixture
def make_claim(sessions: sessionmaker[Session]) -> MakeClaim:
    """Claim in a transaction of its own."""

    def make(kind: Any = "train", worker_id: str = "worker_a", lease_s: float = 60) -> Claim | None:
        with transaction(sessions) as session:
            return claim(session, kind=kind, worker_id=worker_id, host="here", lease_s=lease_s)

    return make
