"""A running job and a folder as the engine leaves it."""

from pathlib import Path

import pytest
from sqlalchemy.orm import Session, sessionmaker

from service import clock
from service.db import transaction
from service.settings import Settings
from service.storage import Storage
from service.tables import DEFAULT_PROJECT, File, Job

FILES = {
    "adapter_config.json": b'{"r": 8}',
    "adapter_model.safetensors": bytes(range(256)) * 33 + b"x",
    "README.md": b"# An adapter\n",
    "tokenizer.json": b"{}" * 256,  # exactly one block
}


@pytest.fixture
def job(sessions: sessionmaker[Session]) -> Job:
    """A running job, detached."""
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
        job = Job(
            id="ftjob-1",
            project_id=DEFAULT_PROJECT,
            created_at=clock.now(),
            status="running",
            model="tiny",
            training_file="file-1",
            seed=0,
            spec={},
            hyperparameters={"lora_r": 8},
            attempt_no=2,
        )
        session.add(job)
    return job


@pytest.fixture
def storage(settings: Settings) -> Storage:
    """This test's blobs."""
    return Storage.open(settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A PEFT folder."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder
