"""Without a broker nothing rings, and everything still happens: workers look by themselves."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from operations.embedded import postgres, valkey
from tests.e2e.conftest import Deployment, User, chat_file, deploy


@pytest.fixture
def quiet(
    tmp_path: Path,
    postgres_server: postgres.Postgres,
    _template: str,
    valkey_server: valkey.Valkey,
    model_folder: Path,
) -> Iterator[Deployment]:
    """A service without a worker."""
    yield from deploy(tmp_path, postgres_server, _template, valkey_server, model_folder)


def test_a_worker_without_a_broker_finds_work_by_itself_and_still_stops_when_told(
    quiet: Deployment,
) -> None:
    nobody = f"redis+socket://{quiet.folder / 'nobody.sock'}"
    worker = quiet.start("worker", NIBBLE_REDIS_URL=nobody, NIBBLE_TRAIN_SLOTS="0")
    user = User(quiet)

    job = user.wait(user.submit(chat_file(3)), "failed")
    user.close()
    worker.send_signal(signal.SIGTERM)
    worker.wait(timeout=90)

    assert job.error is not None
    assert job.error.code == "invalid_n_examples"
