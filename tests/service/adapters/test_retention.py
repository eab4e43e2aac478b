"""Adapters that nothing offers go, a while after their job's end; what is offered stays, and a kill loses track of nothing."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from service import clock
from service.adapters import retention
from service.adapters.actions import of_job, publish, save_checkpoint
from service.db import transaction
from service.settings import Settings
from service.storage import Storage
from service.tables import Adapter, Checkpoint, Job

NOW = timedelta(0)
Sessions = sessionmaker[Session]


@pytest.fixture
def made(
    sessions: Sessions, storage: Storage, job: Job, folder: Path
) -> dict[tuple[int, int], str]:
    """A job's adapters by attempt and step: steps 2, 4, 6, 8 are checkpoints; attempt 1, which was lost, left its own of 2."""
    made: dict[tuple[int, int], str] = {}
    for attempt_no, step in [(1, 2), (1, 3), (2, 2), (2, 4), (2, 6), (2, 8)]:
        with transaction(sessions) as session:
            adapter = publish(session, storage, job, attempt_no, step, folder)
            if step % 2 == 0:
                save_checkpoint(session, job, adapter, organization="org", metrics={})
            made[attempt_no, step] = adapter.id
    return made


def _end(sessions: Sessions, status: str, *, adapter_step: int | None = None) -> None:
    with transaction(sessions) as session:
        job = session.get_one(Job, "ftjob-1")
        job.status, job.adapter_step = status, adapter_step
        job.finished_at = clock.now() - timedelta(minutes=30)


def _left(sessions: Sessions) -> set[tuple[int, int]]:
    with sessions() as session:
        return {(a.attempt_no, a.step_number) for a in session.scalars(select(Adapter))}


def _blobs(settings: Settings) -> set[tuple[int, int]]:
    """Of which attempts' steps there are files, as the folder has them."""
    adapters = settings.data_dir / "blobs" / "adapters" / "ftjob-1"
    files = [path for path in adapters.glob("*/step-*/*") if path.is_file()]
    return {(int(f.parts[-3]), int(f.parts[-2].removeprefix("step-"))) for f in files}


def test_what_a_lost_attempt_left_goes_and_every_checkpoint_stays(
    sessions: Sessions, storage: Storage, settings: Settings, made: dict[tuple[int, int], str]
) -> None:
    _end(sessions, "failed")

    removed = retention.run_once(sessions, storage, grace=NOW)

    kept = {(2, 2), (2, 4), (2, 6), (2, 8)}
    assert removed == 2
    assert _left(sessions) == _blobs(settings) == kept


def test_a_live_job_and_one_that_has_only_just_ended_are_left_alone(
    sessions: Sessions, storage: Storage, made: dict[tuple[int, int], str]
) -> None:
    live = retention.run_once(sessions, storage, grace=NOW)
    _end(sessions, "failed")
    just_ended = retention.run_once(sessions, storage)

    assert (live, just_ended) == (0, 0)
    assert _left(sessions) == set(made)


def test_of_many_checkpoints_the_last_stay_and_that_of_the_offered_adapter(
    sessions: Sessions, storage: Storage, settings: Settings, made: dict[tuple[int, int], str]
) -> None:
    _end(sessions, "succeeded", adapter_step=2)

    retention.run_once(sessions, storage, keep_checkpoints=2, grace=NOW)

    with sessions() as session:
        listed = set(session.scalars(select(Checkpoint.step_number)))
        offered = of_job(session, session.get_one(Job, "ftjob-1"))
    assert listed == {2, 6, 8}
    assert offered.id == made[2, 2]
    assert _left(sessions) == _blobs(settings) == {(2, 2), (2, 6), (2, 8)}


def test_with_no_checkpoint_kept_the_offered_adapter_still_stays(
    sessions: Sessions, storage: Storage, settings: Settings, made: dict[tuple[int, int], str]
) -> None:
    with transaction(sessions) as session:
        for checkpoint in session.scalars(select(Checkpoint)):
            session.delete(checkpoint)
    _end(sessions, "succeeded", adapter_step=None)

    retention.run_once(sessions, storage, keep_checkpoints=0, grace=NOW)

    assert _left(sessions) == _blobs(settings) == {(2, 8)}


_DIES_AT_THE_SECOND_FILE = """
import os
from datetime import timedelta
from service import db
from service.adapters import retention
from service.settings import read_settings
from service.storage import Storage

class Dying(Storage):
    deleted = 0

    def delete(self, key):
        super().delete(key)
        self.deleted += 1
        if self.deleted == 2:
            os._exit(9)

settings = read_settings()
retention.run_once(db.sessions(db.connect(settings)), Dying.open(settings), grace=timedelta(0))
"""


def test_a_process_that_dies_between_two_files_leaves_nothing_that_the_next_pass_does_not_find(
    sessions: Sessions, storage: Storage, settings: Settings, made: dict[tuple[int, int], str]
) -> None:
    _end(sessions, "cancelled")
    assert settings.database_url
    given = {
        "NIBBLE_DATA_DIR": str(settings.data_dir),
        "NIBBLE_DATABASE_URL": settings.database_url.get_secret_value(),
    }

    child = subprocess.run(
        [sys.executable, "-c", _DIES_AT_THE_SECOND_FILE], env=os.environ | given, timeout=60
    )
    after_the_kill = _left(sessions)

    removed = retention.run_once(sessions, storage, grace=NOW)

    assert child.returncode == 9
    assert after_the_kill == set(made), "rows outlive their bytes, never the reverse"
    assert removed == 2
    assert _left(sessions) == _blobs(settings)
