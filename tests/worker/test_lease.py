"""Keeping a lease through errors that nobody expected."""

import threading
import time
from pathlib import Path

from sqlalchemy import event
from sqlalchemy.orm import Session, sessionmaker

from service.db import connect, transaction
from service.db import sessions as sessions_of
from service.queue.claim import claim
from service.settings import Settings
from tests.worker.conftest import Submit, chat_lines
from worker.folder import AttemptFolder
from worker.lease import LeaseKeeper, boottime


def test_an_unexpected_error_is_outlasted_like_an_outage(
    settings: Settings, submit: Submit, sessions: sessionmaker[Session], tmp_path: Path
) -> None:
    submit(chat_lines(12))
    with transaction(sessions) as session:
        claimed = claim(session, kind="validate", worker_id="worker_a", host="here", lease_s=60)
    assert claimed is not None
    engine = connect(settings)
    failed = threading.Event()

    @event.listens_for(engine, "begin")
    def fail_once(_: object) -> None:  # pyright: ignore[reportUnusedFunction]
        if not failed.is_set():
            failed.set()
            raise RuntimeError("nobody expected this")

    folder = AttemptFolder(tmp_path)
    held_since = boottime()
    keeper = LeaseKeeper(
        sessions_of(engine), claimed.fence, folder, lease_s=60, renew_s=0.1, held_since=held_since
    )

    keeper.start()
    deadline = time.monotonic() + 30
    while (folder.read_deadline() or 0) <= held_since + 60 and time.monotonic() < deadline:
        time.sleep(0.02)
    keeper.stop()
    engine.dispose()

    assert failed.is_set()
    until = folder.read_deadline()
    assert until is not None
    assert until > held_since + 60
