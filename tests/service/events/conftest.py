"""A job whose story is told."""

import pytest
from sqlalchemy.orm import Session, sessionmaker

from service import clock
from service.db import transaction
from service.tables import DEFAULT_PROJECT, File, Job


@pytest.fixture
def job_id(sessions: sessionmaker[Session]) -> str:
    """The id of a job without any event."""
    with transaction(sessions) as session:
        session.add(
            File(
                id="file-1",
                project_id=DEFAULT_PROJECT,
                filename="train.jsonl",
                purpose="fine-tune",
                bytes=1,
                sha256="0" * 64,
                blob_key="file-1",
                created_at=clock.now(),
            )
        )
        session.flush()
        session.add(
            Job(
                id="ftjob-1",
                project_id=DEFAULT_PROJECT,
                created_at=clock.now(),
                status="running",
                model="tiny",
                training_file="file-1",
                seed=0,
                spec={},
                hyperparameters={},
            )
        )
    return "ftjob-1"
