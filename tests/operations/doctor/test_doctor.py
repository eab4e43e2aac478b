"""`nibble doctor` beside real servers: well, and each way of being ill that can be made here."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from operations import migrate
from operations.doctor import servers
from operations.doctor.command import examine
from operations.doctor.finding import Finding
from operations.doctor.machine import examine_disk, examine_folder
from operations.doctor.queue import examine_leases, examine_queue, examine_workers
from operations.embedded import postgres
from service import clock, db
from service.queue.workers import WorkerSlots, sign_in
from service.settings import Settings
from tests.job_row import add_job
from tests.operations.conftest import Launcher

LONG_AGO = timedelta(minutes=10)


def _doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nibble", "doctor", "--no-probe", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


def _sign_in(session: Session, *, train: int = 1, problem: str | None = None) -> str:
    slots = WorkerSlots(train=train, validate=1, problem=problem)
    sign_in(session, worker_id="worker_here", host="here", pid=1, slots=slots)
    return "worker_here"


def test_a_service_that_runs_is_well_and_its_doctor_ends_with_1_once_its_worker_is_gone(
    launch: Callable[..., Launcher], tmp_path: Path
) -> None:
    launcher = launch()
    launcher.url()
    url = postgres.running_url(tmp_path / "data")
    assert url
    engine = db.connect(Settings(database_url=SecretStr(url)), pool_size=1)
    with db.transaction(db.sessions(engine)) as session:
        _sign_in(session)

    well = _doctor("--data-dir", str(tmp_path / "data"), "--json")
    with engine.begin() as connection:
        connection.execute(text("UPDATE workers SET seen_at = now() - interval '1 hour'"))
    ill = _doctor("--data-dir", str(tmp_path / "data"))

    engine.dispose()
    told = json.loads(well.stdout)
    assert {f["check"]: f["level"] for f in told["findings"]} == {
        "data folder": "ok",
        "disk": "ok",
        "storage": "ok",
        "migrations": "ok",
        "database": "ok",
        "clock": "ok",
        "workers": "ok",
        "queue": "ok",
        "leases": "ok",
        "broker": "ok",
        "api": "ok",
        "gpu": "ok",
    }, told
    assert (well.returncode, told["ok"]) == (0, True)
    assert ill.returncode == 1
    assert [line.split()[:2] for line in ill.stdout.splitlines() if not line.startswith("ok")] == [
        ["FAIL", "workers"]
    ]
    assert "nibble up" in ill.stdout


def test_where_nothing_runs_it_says_what_to_start(tmp_path: Path) -> None:
    ended = _doctor("--data-dir", str(tmp_path / "none"))

    assert ended.returncode == 1
    assert "none runs over" in ended.stdout
    assert "--data-dir" in ended.stdout
    assert not (tmp_path / "none").exists(), "a doctor leaves nothing behind"


def test_servers_that_do_not_answer_are_one_line_each(settings: Settings) -> None:
    settings.data_dir.mkdir(mode=0o700)
    (settings.data_dir / "blobs").mkdir()
    away = {
        "database_url": SecretStr("postgresql+psycopg://127.0.0.1:1/none"),
        "redis_url": SecretStr("redis://127.0.0.1:1"),
        "port": 1,
    }

    found = examine(settings.model_copy(update=away), probe=False)

    ill = {finding.check for finding in found if finding.level == "FAIL"}
    assert ill == {"database", "broker", "api"}
    assert all(f.todo for f in found if f.level != "ok")


def test_a_schema_that_is_behind_and_one_of_a_newer_version_are_told_apart(
    engine: Engine, settings: Settings
) -> None:
    assert settings.database_url
    migrate.downgrade(settings.database_url.get_secret_value(), "-1")
    behind = servers.examine_migrations(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'from_the_future'"))
    newer = servers.examine_migrations(engine)

    assert (behind.level, newer.level) == ("FAIL", "FAIL")
    assert "operations.migrate" in str(behind.todo)
    assert "from_the_future" in newer.message


def test_a_database_whose_clock_is_off_is_a_warning(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = servers.time.time
    monkeypatch.setattr(servers.time, "time", lambda: real() + 600)

    finding = servers.examine_clock(session)

    assert finding.level == "warn"
    assert "600 s ahead" in finding.message


def test_work_that_waits_beside_an_idle_slot_is_stuck(session: Session, settings: Settings) -> None:
    _sign_in(session)
    add_job(session, created_at=clock.now() - LONG_AGO)

    finding = examine_queue(session, settings)

    assert finding.level == "FAIL"
    assert "1 job waited to be trained" in finding.message


def test_work_that_waits_for_a_busy_slot_is_not(session: Session, settings: Settings) -> None:
    worker = _sign_in(session)
    add_job(session, created_at=clock.now() - LONG_AGO)
    add_job(session, status="running", lease_owner=worker, lease_until=clock.now() + LONG_AGO)

    assert examine_queue(session, settings).level == "ok"


def test_work_that_has_only_just_begun_to_wait_is_not(session: Session, settings: Settings) -> None:
    _sign_in(session)
    add_job(session)

    assert examine_queue(session, settings) == Finding("queue", "ok", "moves (1 queued)")


def test_work_that_nobody_does_is_stuck_and_work_that_fits_nowhere_is_a_warning(
    session: Session, settings: Settings
) -> None:
    _sign_in(session, train=0)
    add_job(session, created_at=clock.now() - LONG_AGO, unfit_told_at=clock.now())
    too_large = examine_queue(session, settings)
    add_job(session, created_at=clock.now() - LONG_AGO)
    nobody = examine_queue(session, settings)

    assert (too_large.level, nobody.level) == ("warn", "FAIL")
    assert "larger GPU" in too_large.message
    assert "no worker does that" in nobody.message


def test_a_worker_that_cannot_train_says_why(session: Session) -> None:
    _sign_in(session, train=0, problem="A Triton kernel does not run here.")

    finding = examine_workers(session)

    assert (finding.level, finding.message) == ("FAIL", "A Triton kernel does not run here.")


def test_a_lease_that_nobody_took_back_is_told(session: Session, settings: Settings) -> None:
    held = {"status": "running", "lease_owner": "worker_gone"}
    add_job(session, **held, lease_until=clock.now() + LONG_AGO)
    well = examine_leases(session, settings)
    add_job(session, **held, lease_until=clock.now() - LONG_AGO)
    ill = examine_leases(session, settings)

    assert (well.level, ill.level) == ("ok", "FAIL")
    assert "API's process" in str(ill.todo)


def test_little_room_is_told_before_there_is_none(settings: Settings) -> None:
    settings.data_dir.mkdir(mode=0o700)
    free = shutil.disk_usage(settings.data_dir).free

    levels = [
        examine_disk(settings.model_copy(update={"min_free_bytes": least})).level
        for least in (0, free // 5, free * 2)
    ]

    assert levels == ["ok", "warn", "FAIL"]


def test_a_folder_or_a_key_that_others_may_read_is_told(settings: Settings) -> None:
    settings.data_dir.mkdir(mode=0o700)
    closed = examine_folder(settings)
    settings.data_dir.chmod(0o755)
    opened = examine_folder(settings)
    settings.first_key_file.write_text("sk-nibble-none")
    settings.first_key_file.chmod(0o644)
    readable_key = examine_folder(settings)

    assert [f.level for f in (closed, opened, readable_key)] == ["ok", "warn", "FAIL"]
    assert "chmod 600" in str(readable_key.todo)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_told(settings: Settings) -> None:
    settings.data_dir.mkdir(mode=0o500)

    assert examine_folder(settings).level == "FAIL"


def test_a_storage_folder_that_is_not_there_is_told_and_not_made(tmp_path: Path) -> None:
    away = tmp_path / "not mounted"

    told = servers.examine_storage(Settings(data_dir=tmp_path, storage_url=f"file://{away}"))

    assert told.level == "FAIL", told
    assert str(away) in told.line()
    assert not away.exists()
