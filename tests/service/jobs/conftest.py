"""What a create call needs, without the API around it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy.orm import Session, sessionmaker

from service import clock
from service.db import transaction
from service.ids import new_id
from service.jobs import actions
from service.jobs.fingerprint import Fingerprint
from service.jobs.spec import CreateJob
from service.keys.actions import Caller
from service.models.catalog import Catalog
from service.settings import Settings
from service.tables import DEFAULT_PROJECT, File

CALLER = Caller(project_id=DEFAULT_PROJECT, key_id="key_mine")


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """A catalog of one model."""
    path = tmp_path / "models.toml"
    path.write_text('[models.tiny]\npath = "tiny"\n')
    return Catalog.load(path)


@pytest.fixture
def file_id(sessions: sessionmaker[Session]) -> str:
    """The id of a training file."""
    id_ = new_id("file-")
    with transaction(sessions) as session:
        session.add(
            File(
                id=id_,
                project_id=DEFAULT_PROJECT,
                filename="train.jsonl",
                purpose="fine-tune",
                bytes=1,
                sha256="0" * 64,
                blob_key=id_,
                created_at=clock.now(),
            )
        )
    return id_


Create = Callable[..., str]


@pytest.fixture
def create(
    sessions: sessionmaker[Session], settings: Settings, catalog: Catalog, file_id: str
) -> Create:
    """Make a create call in a transaction of its own and return the job's id."""

    def call(
        *,
        caller: Caller = CALLER,
        key: str | None = None,
        retry: str | None = None,
        seed: int = 1,
        max_waiting_jobs: int = 1_000,
    ) -> str:
        body = CreateJob(model="tiny", training_file=file_id, seed=seed)
        fingerprint = Fingerprint.of(body, idempotency_key=key, retry_count=retry)
        limited = settings.model_copy(update={"max_waiting_jobs": max_waiting_jobs})
        with transaction(sessions) as session:
            return actions.create(session, catalog, limited, caller, body, fingerprint).id

    return call
