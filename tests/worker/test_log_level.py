"""What a worker says reaches its log at the level that is set, although Celery starts within it with one of its own."""

import json
import subprocess
import sys
from pathlib import Path

_SAYS_AFTER_CELERY_HAS_STARTED = """
import logging, sys
from unittest.mock import sentinel
from service.logging import configure, get_logger
from service.settings import Settings
from worker.app import make_worker_app

configure(sys.argv[1])
app = make_worker_app(Settings(redis_url="redis://127.0.0.1:1/0"), sentinel.crew)
app.log.setup(loglevel="WARNING")  # what `celery worker` does before it listens
get_logger("worker.supervisor").info("attempt_ended")
logging.getLogger("celery.worker.strategy").info("Task kick received")
logging.getLogger("celery.worker.consumer").warning("connection lost")
"""


def _told(level: str, folder: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", _SAYS_AFTER_CELERY_HAS_STARTED, level],
        env={"PYTHONPATH": ":".join(sys.path)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["event"] for line in done.stderr.splitlines()]


def test_a_worker_tells_of_its_attempts_but_not_of_every_kick(tmp_path: Path) -> None:
    assert _told("INFO", tmp_path) == ["attempt_ended", "connection lost"]


def test_a_worker_that_shall_only_tell_of_errors_does(tmp_path: Path) -> None:
    assert _told("ERROR", tmp_path) == []
