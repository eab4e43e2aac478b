"""The service that is under fire: the launcher as people start it (PostgreSQL, Valkey, API), and three workers beside it.

Faults find their victims as an operator would, among the processes and in the database. Everything that the run starts
carries a mark in its environment, so that what is left over at the end can be told from other processes.
"""

import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import psutil
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from operations.children import Kept, Running, start_program
from operations.embedded import postgres, processes, valkey
from tests.free_port import free_port

WORKERS = 3
MAX_ATTEMPTS = 50
"""So high that no job fails for being hit too often: what is asked is whether each of them ends well."""
_MARK = "CHAOS_RUN"
_START_S = 120.0
_STOP_S = 90.0
_SETTINGS = {
    "NIBBLE_MIN_FREE_BYTES": "0",
    "NIBBLE_LEASE_S": "6",
    "NIBBLE_RENEW_S": "1",
    "NIBBLE_POLL_S": "2",
    "NIBBLE_REAP_S": "0.5",
    "NIBBLE_STOP_GRACE_S": "20",
    "NIBBLE_MAX_ATTEMPTS": str(MAX_ATTEMPTS),
    "OMP_NUM_THREADS": "1",
}

Rows = list[Any]


class NotInTime(AssertionError):
    """Something that must come did not; the message says what."""


class Service:
    """One run's service over `folder`. Everything but `query` and `is_ready` is for the thread that made it."""

    def __init__(self, folder: Path, model: Path, *, say: Callable[[str], None]) -> None:
        """Start it and wait until the API is ready; the workers may still be on their way."""
        self.folder = folder
        self.data_dir = folder / "data"
        self.say = say
        self.port = free_port()
        self.mark = secrets.token_hex(8)
        catalog = folder / "models.toml"
        catalog.write_text(f'[models.tiny]\npath = "{model}"\n', encoding="utf-8")
        kept_back = {k: v for k, v in os.environ.items() if not k.startswith("NIBBLE_")}
        self._environment = {
            **kept_back,
            **_SETTINGS,
            _MARK: self.mark,
            "NIBBLE_DATA_DIR": str(self.data_dir),
            "NIBBLE_MODELS_FILE": str(catalog),
            "NIBBLE_PORT": str(self.port),
            "PYTHONUNBUFFERED": "1",
        }
        self._kept: list[Kept] = []
        self._engine: Engine | None = None
        try:
            self._keep("The launcher", self._start_launcher)
            self.wait_for(self.is_ready, timeout_s=_START_S, why="the API is not ready")
            self._engine = self._connect()
            for number in range(1, WORKERS + 1):
                self._keep(f"Worker {number}", lambda n=number: self._start_worker(n))
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        """Where the API answers, without a path."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def key(self) -> str:
        """The first API key."""
        return (self.data_dir / "first-api-key").read_text(encoding="utf-8").strip()

    @property
    def engine(self) -> Engine:
        """The run's own eye on the database."""
        if self._engine is None:
            raise RuntimeError("the service is not there")
        return self._engine

    def wait_for(self, what: Callable[[], bool], *, timeout_s: float, why: str) -> None:
        """Look after the processes until `what` holds.

        Raises:
            NotInTime: it did not within `timeout_s`; the message has `why`.
        """
        deadline = time.monotonic() + timeout_s
        while not what():
            if time.monotonic() > deadline:
                raise NotInTime(f"not within {timeout_s:.0f} s: {why}")
            for kept in self._kept:
                kept.look_after()
            time.sleep(0.1)

    def pause(self, seconds: float) -> None:
        """Let time pass, looking after the processes."""
        until = time.monotonic() + seconds
        self.wait_for(lambda: time.monotonic() >= until, timeout_s=seconds + 60, why="time passes")

    def is_ready(self) -> bool:
        """Whether the API says so."""
        try:
            return httpx2.get(f"{self.url}/readyz", timeout=2).status_code == 200
        except httpx2.TransportError:
            return False

    def query(self, sql: str, **values: object) -> Rows | None:
        """The rows; None: the database does not answer."""
        try:
            with self.engine.connect() as connection:
                return list(connection.execute(text(sql), values))
        except SQLAlchemyError:
            return None

    def is_whole(self) -> bool:
        """Whether every process is there, has signed in, and the API is ready."""
        if any(kept.ended() for kept in self._kept) or not self.is_ready():
            return False
        signed_in = self.query("SELECT pid FROM workers WHERE stopped_at IS NULL")
        return signed_in is not None and set(self.worker_pids()) <= {row.pid for row in signed_in}

    def worker_pids(self) -> list[int]:
        """Of the workers' parents that are kept just now, launcher excluded."""
        return [kept.running.process.pid for kept in self._kept[1:]]

    def server(self, name: str) -> psutil.Process | None:
        """The launcher's child whose command line has `name`: "postgres", "api"."""
        with suppress(psutil.Error):
            for child in psutil.Process(self._kept[0].running.process.pid).children():
                words = child.cmdline()
                if name in (Path(words[0]).name, words[-1]):
                    return child
        return None

    def is_ours(self, pid: int) -> bool:
        """Whether a process carries this run's mark: a pid in a row may be somebody else's by now."""
        with suppress(OSError):
            return f"{_MARK}={self.mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
        return False

    def stop_workers(self) -> None:
        """End the workers in good order, so that nothing moves any more."""
        while len(self._kept) > 1:
            self._kept.pop().stop()

    def stop(self) -> None:
        """End everything in good order."""
        self.stop_workers()
        if self._engine is not None:
            self._engine.dispose()
        while self._kept:
            self._kept.pop().stop()

    def left_over(self) -> list[str]:
        """The processes that carry this run's mark."""
        found: list[str] = []
        for process in psutil.process_iter():
            if process.pid != os.getpid() and self.is_ours(process.pid):
                with suppress(psutil.Error):
                    found.append(f"{process.pid} {' '.join(process.cmdline())[:120]}")
        return found

    def kill_left_over(self) -> None:
        """End what this run started and did not end by itself."""
        for process in psutil.process_iter():
            if process.pid != os.getpid() and self.is_ours(process.pid):
                with suppress(psutil.Error):
                    process.kill()

    def _keep(self, name: str, start: Callable[[], Running]) -> None:
        self._kept.append(Kept(name, start, self.say))

    def _start_launcher(self) -> "Launcher":
        return Launcher(self._environment, self.folder / "launcher.log")

    def _start_worker(self, number: int) -> Running:
        database, broker = postgres.running_url(self.data_dir), valkey.running_url(self.data_dir)
        if database is None or broker is None:
            raise processes.EmbeddedError("there are no servers yet")
        urls = {"NIBBLE_DATABASE_URL": database, "NIBBLE_REDIS_URL": broker}
        log = self.folder / f"worker-{number}.log"
        return start_program("worker", env=self._environment | urls, log=log, grace_s=_STOP_S)

    def _connect(self) -> Engine:
        url = postgres.running_url(self.data_dir)
        if url is None:
            raise RuntimeError("the launcher is ready, and its PostgreSQL is nowhere")
        return create_engine(url, pool_pre_ping=True, pool_size=2)


class Launcher:
    """A running `python -m operations up`, without a worker of its own."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self.log = log
        # Where the run itself is killed, the launcher is told to stop, and takes everything along.
        self.process = processes.start_tied(
            [sys.executable, "-m", "operations", "up", "--no-worker"],
            log=log,
            death_signal=signal.SIGTERM,
            env=environment,
        )

    def stop(self) -> None:
        """Ask it to stop everything; safe to call twice."""
        processes.stop(self.process, signal.SIGTERM, timeout_s=_STOP_S)
