"""What containers ask: does the API, does the worker of this machine work?"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from operations.embedded import postgres
from tests.operations.conftest import Launcher


def _health(part: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "operations.health", part],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | env,
    )


def test_api_and_worker_are_well_until_they_are_gone_and_go_with_their_launcher(
    launch: Callable[..., Launcher], tmp_path: Path
) -> None:
    launcher = launch(worker=True)
    port = launcher.url().rsplit(":", 1)[1]
    database_url = postgres.running_url(tmp_path / "data")
    assert database_url

    api = _health("api", NIBBLE_PORT=port)
    deadline = time.monotonic() + 90
    while (worker := _health("worker", NIBBLE_DATABASE_URL=database_url)).returncode != 0:
        assert time.monotonic() < deadline, worker.stdout

    assert (api.returncode, api.stdout) == (0, "ok\n")
    family = launcher.family()
    launcher.process.kill()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == [], "the worker and its children too"
    gone = _health("api", NIBBLE_PORT=port)
    assert gone.returncode == 1
    assert "does not answer" in gone.stdout
    blind = _health("worker", NIBBLE_DATABASE_URL=database_url)
    assert blind.returncode == 1
    assert "the database does not answer" in blind.stdout


def test_a_host_without_a_worker_is_ill(database_url: str) -> None:
    ended = _health("worker", NIBBLE_DATABASE_URL=database_url)

    assert ended.returncode == 1
    assert "no worker of this host" in ended.stdout


def test_another_part_is_refused() -> None:
    assert _health("everything").returncode == 2
