"""The real application behind a real socket: in a thread for most tests, as its own process where that is the point."""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import structlog
import uvicorn
from openai import OpenAI
from pydantic import SecretStr
from sqlalchemy.orm import Session, sessionmaker

from api.main import create_app
from operations.embedded import postgres, valkey
from service import clock, db
from service.db import transaction
from service.keys.actions import create_key
from service.settings import Settings
from service.storage import Storage
from service.tables import Project
from tests.free_port import free_port
from tests.hand_worker import HandWorker

CHAT_LINE = b'{"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}\n'
"""One line of a sound training file."""


@pytest.fixture(scope="session", autouse=True)
def _logs_go_to_the_standard_library() -> None:
    """As in the process, but without a handler of our own: pytest has its own."""
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, structlog.stdlib.render_to_log_kwargs],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )


def write_catalog(folder: Path) -> Path:
    """Write a catalog of two models, a local folder and one of a hub, and return the file."""
    (folder / "tiny-llama").mkdir()
    catalog = folder / "models.toml"
    catalog.write_text(
        '[models.tiny-llama]\npath = "tiny-llama"\n\n'
        '[models.far-llama]\nhub = "somebody/far-llama"\nrevision = "0123abc"\n'
    )
    return catalog


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    """The settings, with a catalog."""
    return settings.model_copy(update={"models_file": write_catalog(tmp_path)})


@pytest.fixture(scope="module")
def steady_settings(
    tmp_path_factory: pytest.TempPathFactory,
    postgres_server: postgres.Postgres,
    valkey_server: valkey.Valkey,
    _template: str,
) -> Iterator[Settings]:
    """The settings of `steady`."""
    folder = tmp_path_factory.mktemp("steady")
    with closing_database(postgres_server, _template) as database_url:
        yield Settings(
            _env_file=None,  # pyright: ignore[reportCallIssue]
            data_dir=folder / "data",
            database_url=SecretStr(database_url),
            redis_url=SecretStr(valkey_server.url),
            models_file=write_catalog(folder),
            min_free_bytes=0,
        )


@pytest.fixture(scope="module")
def steady(steady_settings: Settings) -> Iterator[httpx2.Client]:
    """A client, with a key, of one API for all tests of a file: for tests that leave nothing behind there."""
    with serve(steady_settings) as url:
        key = steady_settings.first_key_file.read_text().strip()
        headers = {"authorization": f"Bearer {key}"}
        with httpx2.Client(base_url=url, headers=headers, timeout=30) as client:
            yield client


@contextlib.contextmanager
def closing_database(server: postgres.Postgres, template: str) -> Iterator[str]:
    """Give the URL of a database of its own, made from the template."""
    name = f"steady_{secrets.token_hex(8)}"
    with server.connect() as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}".encode())
    yield server.url_of(name)
    with server.connect() as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@contextlib.contextmanager
def serve(settings: Settings) -> Iterator[str]:
    """Serve the application from a thread of this process and give its address."""
    # With its protocol named, as uvicorn's own: asyncio sets TCP_NODELAY on no other, and an answer that
    # waits for an acknowledgement is lost when the connection is cut off after it.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        create_app(settings), log_config=None, access_log=False, timeout_graceful_shutdown=2
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        assert server.started, "the application did not start; its log says why"
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        listener.close()


@pytest.fixture
def base_url(settings: Settings) -> Iterator[str]:
    """The address of a running API."""
    with serve(settings) as url:
        yield url


@pytest.fixture
def key(base_url: str, settings: Settings) -> str:
    """The first key, from the file the API made at its start."""
    return settings.first_key_file.read_text().strip()


@pytest.fixture
def client(base_url: str, key: str) -> Iterator[OpenAI]:
    """The official SDK, pointed at us as any team would."""
    with OpenAI(base_url=f"{base_url}/v1", api_key=key, max_retries=0) as client:
        yield client


@pytest.fixture
def http(base_url: str, key: str) -> Iterator[httpx2.Client]:
    """A plain client with the key, for what the SDK would never send."""
    with httpx2.Client(
        base_url=base_url, headers={"authorization": f"Bearer {key}"}, timeout=30
    ) as client:
        yield client


@dataclass
class ApiProcess:
    """`python -m api`, running."""

    url: str
    pid: int
    log: Path


@contextlib.contextmanager
def run_process(
    settings: Settings,
    log: Path,
    *,
    environment: dict[str, str] | None = None,
    before_exec: Callable[[], None] | None = None,
) -> Iterator[ApiProcess]:
    """Run `python -m api` until the block ends, which must end it well.

    Args:
        settings: handed over as `NIBBLE_…` variables; the port is chosen here.
        log: a file for its standard error.
        environment: further variables.
        before_exec: run in the child before it becomes the API (to set its limits).
    """
    port = free_port()
    given = {"PATH": os.environ["PATH"], "HOME": str(log.parent), **_mark(), **(environment or {})}
    for name, value in settings.model_copy(update={"port": port}):
        if value is not None:
            secret = getattr(value, "get_secret_value", None)
            given[f"NIBBLE_{name.upper()}"] = str(secret() if secret else value)
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "api"],
            env=given,
            stderr=stderr,
            preexec_fn=before_exec,  # noqa: PLW1509
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: process.poll() is not None or _is_ready(url))
        assert process.poll() is None, log.read_text()
        yield ApiProcess(url=url, pid=process.pid, log=log)
    finally:
        process.terminate()
        try:
            code = process.wait(timeout=60)
        finally:
            process.kill()
            process.wait()
    assert code == 0, f"ended with {code}: {log.read_text()}"


def wait_until(condition: Callable[[], bool], *, within_s: float = 90.0) -> None:
    """Wait until `condition()` holds; fail when it does not in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {within_s} s in vain"
        time.sleep(0.02)


def _mark() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k.startswith("PYTEST_NIBBLE")}


def _is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/readyz").status_code == 200
    except httpx2.TransportError:
        return False


@pytest.fixture
def other_team(settings: Settings, base_url: str) -> Iterator[OpenAI]:
    """The SDK with a key of another project."""
    engine = db.connect(settings)
    with transaction(db.sessions(engine)) as session:
        now = clock.now()
        session.add(Project(id="proj_other", name="Other", created_at=now))
        session.flush()
        _, secret = create_key(session, "proj_other", "theirs")
    engine.dispose()
    with OpenAI(base_url=f"{base_url}/v1", api_key=secret, max_retries=0) as client:
        yield client


@pytest.fixture
def training_file(client: OpenAI) -> str:
    """The id of a sound training file."""
    file = client.files.create(file=("train.jsonl", CHAT_LINE * 12), purpose="fine-tune")
    return file.id


@pytest.fixture
def worker(sessions: sessionmaker[Session], settings: Settings, tmp_path: Path) -> HandWorker:
    """A worker played by hand, over the running API's database and storage."""
    return HandWorker(sessions, settings, Storage.open(settings), tmp_path / "scratch")


def blobs_of(settings: Settings) -> list[Path]:
    """Return every file under the storage's folder, also those still being written."""
    return [path for path in (settings.data_dir / "blobs").rglob("*") if path.is_file()]
