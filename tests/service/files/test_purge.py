"""A deleted file's bytes outlive its visibility for as long as a live job needs them, and no longer."""

import asyncio
import os
from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session, sessionmaker

from service import clock
from service.db import transaction
from service.errors import NotFound
from service.files import actions, purge
from service.files.upload import Upload
from service.ids import new_id
from service.settings import Settings
from service.storage import BlobMissing, Storage
from service.tables import DEFAULT_PROJECT, File, Job

LATER = timedelta(0)
LINE = b'{"messages": []}\n'


@pytest.fixture
def storage(settings: Settings) -> Storage:
    return Storage.open(settings)


@pytest.fixture
def new_file(
    settings: Settings, storage: Storage, sessions: sessionmaker[Session]
) -> Callable[[], File]:
    """Make a stored file."""

    async def store() -> File:
        upload = Upload(
            settings, storage, project_id=DEFAULT_PROJECT, filename="a.jsonl", stored_bytes=0
        )
        await upload.write(LINE, purpose="fine-tune")
        uploaded = await upload.finish("fine-tune")
        with transaction(sessions) as session:
            return actions.register_uploaded(
                session, settings, DEFAULT_PROJECT, uploaded, expires_after_s=None
            )

    return lambda: asyncio.run(store())


def delete(sessions: sessionmaker[Session], file: File) -> None:
    with transaction(sessions) as session:
        actions.delete_file(session, DEFAULT_PROJECT, file.id)


def add_job(sessions: sessionmaker[Session], status: str, file: File, validation: File) -> str:
    job_id = new_id("ftjob-")
    with transaction(sessions) as session:
        session.add(
            Job(
                id=job_id,
                project_id=DEFAULT_PROJECT,
                created_at=clock.now(),
                status=status,
                model="tiny-llama",
                training_file=file.id,
                validation_file=validation.id,
                seed=1,
                spec={},
                hyperparameters={},
            )
        )
    return job_id


def test_a_deleted_file_s_bytes_go_after_the_grace(
    sessions: sessionmaker[Session], storage: Storage, new_file: Callable[[], File]
) -> None:
    file, kept = new_file(), new_file()
    delete(sessions, file)

    too_early = purge.run_once(sessions, storage)
    removed = purge.run_once(sessions, storage, grace=LATER)
    again = purge.run_once(sessions, storage, grace=LATER)

    assert (too_early, removed, again) == (0, 1, 0)
    with pytest.raises(BlobMissing):
        storage.size(file.blob_key)
    assert storage.size(kept.blob_key) == len(LINE)


@pytest.mark.parametrize("status", ["validating_files", "queued", "running"])
def test_they_stay_while_a_live_job_needs_them(
    sessions: sessionmaker[Session], storage: Storage, new_file: Callable[[], File], status: str
) -> None:
    training, validation = new_file(), new_file()
    job_id = add_job(sessions, status, training, validation)
    for file in (training, validation):
        delete(sessions, file)

    while_alive = purge.run_once(sessions, storage, grace=LATER)
    with transaction(sessions) as session:
        session.execute(update(Job).where(Job.id == job_id).values(status="failed"))
    afterwards = purge.run_once(sessions, storage, grace=LATER)

    assert (while_alive, afterwards) == (0, 2)


def test_an_expired_file_is_hidden_and_then_removed(
    sessions: sessionmaker[Session], storage: Storage, new_file: Callable[[], File]
) -> None:
    file = new_file()
    with transaction(sessions) as session:
        session.execute(update(File).values(expires_at=clock.now() - timedelta(seconds=1)))

    removed = purge.run_once(sessions, storage, grace=LATER)

    assert removed == 1
    with transaction(sessions) as session:
        assert session.get_one(File, file.id).deleted_at is not None
        with pytest.raises(NotFound):
            actions.get_file(session, DEFAULT_PROJECT, file.id)


def test_two_processes_remove_each_blob_once(
    sessions: sessionmaker[Session], storage: Storage, new_file: Callable[[], File]
) -> None:
    file = new_file()
    delete(sessions, file)

    with transaction(sessions) as session:
        session.get_one(File, file.id, with_for_update=True)  # as the other one holds it
        meanwhile = purge.run_once(sessions, storage, grace=LATER)

    assert meanwhile == 0
    assert storage.size(file.blob_key) == len(LINE)


def test_the_loop_ends_when_told(sessions: sessionmaker[Session], storage: Storage) -> None:
    stop = purge.start(sessions, storage)

    stop()


def test_a_pass_removes_what_an_upload_left_whose_process_was_killed(
    settings: Settings, storage: Storage, sessions: sessionmaker[Session]
) -> None:
    left = settings.data_dir / "blobs" / ".partial" / "left"
    left.write_bytes(b"half of it")
    os.utime(left, (0, 0))

    purge.run_once(sessions, storage)

    assert not left.exists()
