"""A dump, restored elsewhere, is the same service: its rows, its blobs, its keys, an adapter that downloads."""

import io
import shutil
import tarfile
from pathlib import Path

import httpx2
import pytest
from pydantic import SecretStr
from sqlalchemy import create_engine, select, text
from sqlalchemy.orm import Session, sessionmaker

from operations.backup import repository
from operations.backup.dump import DumpFailed, dump
from operations.backup.manifest import DumpInvalid
from operations.backup.restore import NotEmpty, restore
from service import clock, db
from service.adapters.actions import publish
from service.db import transaction
from service.files import purge
from service.files.actions import register_produced
from service.keys.actions import create_key
from service.removal.repository import hold_off_removal
from service.settings import Settings
from service.storage import BlobMissing, Storage
from service.tables import DEFAULT_PROJECT, File, Job, Outbox
from tests.api.conftest import serve, write_catalog
from tests.job_row import add_job

Sessions = sessionmaker[Session]
CONTENT = bytes(range(256)) * 5
WEIGHTS = b"weights\x00\n\\N\t" * 1000


def _store(session: Session, storage: Storage, folder: Path, name: str, sha256: str) -> File:
    (folder / name).write_bytes(CONTENT)
    storage.put_file(f"files/{name}", folder / name)
    return register_produced(
        session, DEFAULT_PROJECT, name, "fine-tune", f"files/{name}", len(CONTENT), sha256
    )


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    """With a catalog, for the API."""
    return settings.model_copy(update={"models_file": write_catalog(tmp_path)})


@pytest.fixture
def job_id(sessions: Sessions, settings: Settings, tmp_path: Path) -> str:
    """A finished job with an adapter, over a service with a file, a key and a row in the outbox."""
    import hashlib

    storage = Storage.open(settings)
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    with transaction(sessions) as session:
        _store(session, storage, tmp_path, "train.jsonl", hashlib.sha256(CONTENT).hexdigest())
        job_id = add_job(session, status="running", attempt_no=2, suffix="tab\there\\N \n \u00e9")
        job = session.get_one(Job, job_id)
        publish(session, storage, job, 2, 4, folder)
        job.status, job.finished_at, job.adapter_step = "succeeded", clock.now(), 4
        about = {"project_id": DEFAULT_PROJECT, "job_id": job_id}
        session.add(Outbox(type="fine_tuning.job.succeeded", created_at=clock.now(), **about))
        # Its file has no bytes of its own: as one that was purged.
        session.get_one(File, job.training_file).blob_key = ""
    return job_id


@pytest.fixture
def elsewhere(settings: Settings, empty_database_url: str, tmp_path: Path) -> Settings:
    """An empty database and an empty folder."""
    new = {"data_dir": tmp_path / "other", "database_url": SecretStr(empty_database_url)}
    return settings.model_copy(update=new)


def _rows(settings: Settings) -> dict[str, bytes]:
    assert settings.database_url
    engine = create_engine(settings.database_url.get_secret_value())
    with engine.connect() as connection:
        rows = {
            name: b"".join(
                sorted(b"".join(repository.rows_of(connection, name, columns)).split(b"\n"))
            )
            for name, columns in repository.tables()
        }
    engine.dispose()
    return rows


def test_what_is_restored_is_the_same_and_its_adapter_downloads_with_the_old_key(
    sessions: Sessions, settings: Settings, elsewhere: Settings, job_id: str, tmp_path: Path
) -> None:
    with transaction(sessions) as session:
        _, secret = create_key(session, DEFAULT_PROJECT, "mine")

    manifest = dump(settings, tmp_path / "dump")
    restore(elsewhere, tmp_path / "dump")

    rows = _rows(elsewhere)
    assert rows == _rows(settings)
    assert rows["jobs"]
    assert len(manifest.blobs) == 4, "a file, two of the adapter, its manifest"
    with serve(elsewhere) as url:
        headers = {"authorization": f"Bearer {secret}"}
        answer = httpx2.get(
            f"{url}/v1/fine_tuning/jobs/{job_id}/adapter", headers=headers, timeout=30
        )
    assert answer.status_code == 200, answer.text
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        (name,) = [n for n in archive.getnames() if n.endswith("adapter_model.safetensors")]
        file = archive.extractfile(name)
        assert file is not None
        assert file.read() == WEIGHTS


def test_numbers_go_on_after_the_restored_ones(
    settings: Settings, elsewhere: Settings, job_id: str, tmp_path: Path
) -> None:
    dump(settings, tmp_path / "dump")
    restore(elsewhere, tmp_path / "dump")
    engine = db.connect(elsewhere, pool_size=1)

    with transaction(db.sessions(engine)) as session:
        about = {"project_id": DEFAULT_PROJECT, "job_id": job_id}
        session.add(Outbox(type="fine_tuning.job.failed", created_at=clock.now(), **about))
        session.flush()
        ids = session.scalars(select(Outbox.id)).all()

    engine.dispose()
    assert len(set(ids)) == 2


def test_nothing_is_restored_over_anything(
    settings: Settings, elsewhere: Settings, job_id: str, tmp_path: Path
) -> None:
    dump(settings, tmp_path / "dump")
    full_storage = elsewhere.model_copy(update={"data_dir": settings.data_dir})

    with pytest.raises(NotEmpty, match="has tables already"):
        restore(settings, tmp_path / "dump")
    with pytest.raises(NotEmpty, match="the storage has"):
        restore(full_storage, tmp_path / "dump")


def test_a_dump_that_was_changed_is_refused_before_anything_is_written(
    settings: Settings, elsewhere: Settings, job_id: str, tmp_path: Path
) -> None:
    folder = tmp_path / "dump"
    dump(settings, folder)
    blob = folder / "blobs" / "files" / "train.jsonl"
    blob.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(DumpInvalid, match=r"blobs/files/train\.jsonl was changed"):
        restore(elsewhere, folder)
    blob.unlink()
    with pytest.raises(DumpInvalid, match=r"lacks blobs/files/train\.jsonl"):
        restore(elsewhere, folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(DumpInvalid, match="no whole dump"):
        restore(elsewhere, folder)

    assert elsewhere.database_url
    engine = create_engine(elsewhere.database_url.get_secret_value())
    with engine.connect() as connection:
        assert repository.is_empty(connection)
    engine.dispose()
    assert not elsewhere.data_dir.exists()


def test_a_missing_or_a_damaged_blob_is_told_and_no_dump_is_left(
    settings: Settings, job_id: str, tmp_path: Path
) -> None:
    path = settings.data_dir / "blobs" / "files" / "train.jsonl"
    path.write_bytes(CONTENT[1:] + b"x")
    with pytest.raises(DumpFailed, match="not what its row says"):
        dump(settings, tmp_path / "dump")
    path.unlink()
    with pytest.raises(DumpFailed, match="not in the storage"):
        dump(settings, tmp_path / "dump")

    assert not (tmp_path / "dump").exists()
    assert not (tmp_path / "dump.partial").exists()
    (tmp_path / "dump").mkdir()
    with pytest.raises(DumpFailed, match="is there already"):
        dump(settings, tmp_path / "dump")


def test_no_blob_goes_while_a_dump_is_being_made(
    sessions: Sessions, settings: Settings, job_id: str
) -> None:
    storage = Storage.open(settings)
    with transaction(sessions) as session:
        session.execute(text("UPDATE files SET deleted_at = now() - interval '1 day'"))
    engine = db.connect(settings, pool_size=1)
    with engine.connect() as held:
        hold_off_removal(held)
        during = purge.run_once(sessions, storage)
        held.invalidate()

    after = purge.run_once(sessions, storage)

    engine.dispose()
    assert (during, after) == (0, 1)
    with pytest.raises(BlobMissing):
        storage.size("files/train.jsonl")


def test_a_dump_can_be_made_again_after_one(
    settings: Settings, job_id: str, tmp_path: Path, sessions: Sessions
) -> None:
    dump(settings, tmp_path / "one")
    shutil.rmtree(tmp_path / "one")
    dump(settings, tmp_path / "one")

    assert purge.run_once(sessions, Storage.open(settings)) == 0
    assert (tmp_path / "one" / "manifest.json").exists()
