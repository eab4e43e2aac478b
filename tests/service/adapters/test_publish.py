"""Publishing: once per attempt and step, whole or not at all."""

import hashlib
import json
import threading
from pathlib import Path

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session, sessionmaker

from service.adapters import actions
from service.adapters.actions import AdapterIncomplete
from service.db import transaction
from service.storage import Storage
from service.tables import Adapter, Checkpoint, Job
from tests.service.adapters.conftest import FILES


def publish(
    sessions: sessionmaker[Session],
    storage: Storage,
    job: Job,
    folder: Path,
    *,
    attempt_no: int = 2,
    step: int = 5,
) -> Adapter:
    with transaction(sessions) as session:
        return actions.publish(session, storage, job, attempt_no, step, folder)


def test_every_file_is_stored_with_its_hash_and_the_manifest_names_them(
    sessions: sessionmaker[Session], storage: Storage, job: Job, folder: Path
) -> None:
    adapter = publish(sessions, storage, job, folder)

    stored = {file["name"]: b"".join(storage.stream(file["blob_key"])) for file in adapter.files}
    manifest = json.loads(stored["manifest.json"])
    assert list(stored) == sorted([*FILES, "manifest.json"])
    assert {name: stored[name] for name in FILES} == FILES
    for file in adapter.files:
        content = stored[file["name"]]
        assert file["blob_key"] == f"adapters/ftjob-1/2/step-5/{file['name']}"
        assert file["bytes"] == len(content)
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert manifest["files"] == [
        {name: file[name] for name in ("name", "bytes", "sha256")}
        for file in adapter.files
        if file["name"] != "manifest.json"
    ]
    assert (manifest["job"], manifest["attempt"], manifest["step"]) == ("ftjob-1", 2, 5)
    assert manifest["hyperparameters"] == {"lora_r": 8}
    assert adapter.bytes == sum(map(len, stored.values()))


def test_a_second_publication_changes_nothing(
    sessions: sessionmaker[Session], storage: Storage, job: Job, folder: Path
) -> None:
    first = publish(sessions, storage, job, folder)
    (folder / "adapter_model.safetensors").write_bytes(b"something else")

    second = publish(sessions, storage, job, folder)

    assert second.id == first.id
    weights = next(f for f in second.files if f["name"] == "adapter_model.safetensors")
    content = b"".join(storage.stream(weights["blob_key"]))
    assert content == FILES["adapter_model.safetensors"]


def test_other_attempts_and_steps_are_other_adapters(
    sessions: sessionmaker[Session], storage: Storage, job: Job, folder: Path
) -> None:
    ids = {
        publish(sessions, storage, job, folder, attempt_no=attempt_no, step=step).id
        for attempt_no in (1, 2)
        for step in (5, 10)
    }

    assert len(ids) == 4


def test_two_at_once_get_one_adapter(
    sessions: sessionmaker[Session],
    storage: Storage,
    job: Job,
    folder: Path,
    session: Session,
) -> None:
    start = threading.Barrier(2)
    ids: list[str] = []

    def run() -> None:
        start.wait()
        ids.append(publish(sessions, storage, job, folder).id)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(ids) == 2
    assert len(set(ids)) == 1
    assert session.scalars(select(func.count()).select_from(Adapter)).one() == 1


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_that_peft_could_not_load_is_refused(
    sessions: sessionmaker[Session], storage: Storage, job: Job, folder: Path, missing: str
) -> None:
    (folder / missing).unlink()

    with pytest.raises(AdapterIncomplete, match=missing):
        publish(sessions, storage, job, folder)


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_what_is_no_plain_file_is_refused(
    sessions: sessionmaker[Session], storage: Storage, job: Job, folder: Path, kind: str
) -> None:
    odd = folder / "odd"
    if kind == "folder":
        odd.mkdir()
    else:
        odd.symlink_to("/etc/passwd")

    with pytest.raises(AdapterIncomplete, match="odd"):
        publish(sessions, storage, job, folder)


def test_a_newer_attempts_checkpoint_takes_the_place_of_an_older_ones(
    sessions: sessionmaker[Session], storage: Storage, job: Job, folder: Path
) -> None:
    old = publish(sessions, storage, job, folder, attempt_no=2)
    new = publish(sessions, storage, job, folder, attempt_no=3)

    def save(adapter: Adapter, loss: float) -> Checkpoint:
        with transaction(sessions) as session:
            return actions.save_checkpoint(
                session, job, adapter, organization="org", metrics={"train_loss": loss}
            )

    first = save(old, 3.0)
    second = save(new, 2.0)
    late = save(old, 3.0)  # the lost attempt's, told late

    assert first.id == second.id == late.id
    assert first.name == second.name
    assert (second.adapter_id, second.metrics) == (new.id, {"step": 5, "train_loss": 2.0})
    assert (late.adapter_id, late.metrics) == (new.id, {"step": 5, "train_loss": 2.0})
