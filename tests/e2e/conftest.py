"""A whole service as processes of its own: API and worker over real PostgreSQL and Valkey, and OpenAI's SDK before it."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import psutil
import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob
from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session

from operations.embedded import postgres, valkey
from service.tables import Attempt
from tests.free_port import free_port
from tests.tiny_models import save_tiny_llama

ENDED = ("succeeded", "failed", "cancelled")


def chat_file(n: int, *, words: int = 4) -> bytes:
    """A good training file of `n` examples."""
    answer = "a nibble is four bits " * words
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i}?"},
                {"role": "assistant", "content": f"It is {i}, {answer}"},
            ]
        }
        for i in range(n)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def wait_until(what: Callable[[], bool], *, timeout_s: float, why: str) -> None:
    """Wait until `what` holds; fail saying `why` if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not what():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout_s} s: {why}")
        time.sleep(0.05)


@dataclass
class Deployment:
    """The processes of one service and a client of it."""

    folder: Path
    environment: dict[str, str]
    port: int
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list[subprocess.Popen[bytes]])

    @property
    def data_dir(self) -> Path:
        return self.folder / "data"

    def start(self, module: str, **more: str) -> subprocess.Popen[bytes]:
        """Start `python -m module` over this service's settings."""
        with (self.folder / f"{module}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | self.environment | more,
            )
        self.processes.append(process)
        return process

    def start_api(self) -> None:
        """Start the API and wait until it is ready."""
        self.start("api")
        wait_until(self._is_ready, timeout_s=90, why=f"the API is not ready: {self.log('api')}")

    def _is_ready(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/readyz", timeout=2).status_code == 200
        except httpx2.TransportError:
            return False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def key(self) -> str:
        return (self.data_dir / "first-api-key").read_text(encoding="utf-8").strip()

    def log(self, module: str) -> str:
        """The end of a process's log."""
        path = self.folder / f"{module}.log"
        return path.read_text(encoding="utf-8")[-3000:] if path.exists() else ""

    def stop(self) -> None:
        """End every process, the last started first."""
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class User:
    """What a team's script does, by the official SDK."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.client = OpenAI(base_url=f"{deployment.url}/v1", api_key=deployment.key)
        self.jobs = self.client.fine_tuning.jobs
        self.http = httpx2.Client(
            base_url=deployment.url,
            headers={"authorization": f"Bearer {deployment.key}"},
            timeout=60,
        )

    def upload(self, content: bytes) -> str:
        """Upload a training file and return its id."""
        return self.client.files.create(file=("train.jsonl", content), purpose="fine-tune").id

    def submit(
        self,
        content: bytes,
        *,
        validation: bytes | None = None,
        model: str = "tiny",
        **hyper: object,
    ) -> str:
        """Create a job over new files and return its id."""
        job = self.jobs.create(
            model=model,
            training_file=self.upload(content),
            validation_file=None if validation is None else self.upload(validation),
            hyperparameters=hyper,  # pyright: ignore[reportArgumentType]  (ours go beyond OpenAI's three)
        )
        return job.id

    def submit_endless(self) -> str:
        """Create a job that no machine finishes during a test, and return its id when its first step is told."""
        content = chat_file(2000, words=20)
        job_id = self.submit(content, n_epochs=50, batch_size=1)  # 100,000 steps
        self.wait_for_message(job_id, "Step 1/")
        return job_id

    def messages(self, job_id: str) -> list[str]:
        """The messages of a job's events, oldest first."""
        events = list(self.jobs.list_events(job_id, limit=100))
        return [event.message for event in reversed(events)]

    def wait(self, job_id: str, *statuses: str, timeout_s: float = 120) -> FineTuningJob:
        """Wait until a job has one of these statuses (the ended ones) and return it."""
        wanted = statuses or ENDED
        deadline = time.monotonic() + timeout_s
        while (job := self.jobs.retrieve(job_id)).status not in wanted:
            if job.status in ENDED or time.monotonic() > deadline:
                told = self.messages(job_id)
                log = self.deployment.log("worker")
                pytest.fail(f"{job_id} is {job.status}, not {wanted}: {told}, {job.error}\n{log}")
            time.sleep(0.05)
        return job

    def wait_for_message(self, job_id: str, start: str, *, timeout_s: float = 120) -> None:
        """Wait until the job's story has a message that begins so."""
        wait_until(
            lambda: any(message.startswith(start) for message in self.messages(job_id)),
            timeout_s=timeout_s,
            why=f"no {start!r} in {job_id}'s story",
        )

    def close(self) -> None:
        self.http.close()
        self.client.close()


def training_pid(deployment: Deployment, job_id: str) -> int:
    """The process that the job's second attempt, its first to train, runs in, once its worker has noted it."""
    engine = create_engine(deployment.environment["NIBBLE_DATABASE_URL"])
    first = select(Attempt.pid).where(Attempt.job_id == job_id, Attempt.attempt_no == 2)

    def noted_pid() -> int | None:
        with Session(engine) as session:
            return session.scalars(first).one_or_none()

    wait_until(lambda: noted_pid() is not None, timeout_s=120, why="the worker notes no pid")
    pid = noted_pid()
    engine.dispose()
    assert pid is not None
    return pid


def children_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The worker's child processes."""
    return psutil.Process(process.pid).children()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    return save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


def deploy(
    folder: Path,
    server: postgres.Postgres,
    template: str,
    broker: valkey.Valkey,
    model_folder: Path,
    **more: str,
) -> Iterator[Deployment]:
    """Bring up database and API; the worker is the test's. Everything is gone at the end."""
    name = f"e2e_{secrets.token_hex(8)}"
    with server.connect() as connection:
        connection.execute(
            f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy".encode()
        )
    catalog = folder / "models.toml"
    broken, pickled = folder / "no-weights", folder / "pickled"
    for base in (broken, pickled):
        base.mkdir()
        for file in model_folder.iterdir():
            if file.suffix != ".safetensors":
                (base / file.name).write_bytes(file.read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    models = {"tiny": model_folder, "no-weights": broken, "pickled": pickled}
    catalog.write_text(
        "".join(f'[models.{id_}]\npath = "{path}"\n' for id_, path in models.items()),
        encoding="utf-8",
    )
    port = free_port()
    environment = {
        "NIBBLE_DATA_DIR": str(folder / "data"),
        "NIBBLE_DATABASE_URL": server.url_of(name),
        "NIBBLE_REDIS_URL": broker.url,
        "NIBBLE_MODELS_FILE": str(catalog),
        "NIBBLE_PORT": str(port),
        "NIBBLE_MIN_FREE_BYTES": "0",
        "NIBBLE_LEASE_S": "60",
        "NIBBLE_RENEW_S": "1",
        "NIBBLE_POLL_S": "2",
        "NIBBLE_REAP_S": "0.5",
        "NIBBLE_STOP_GRACE_S": "10",
        "OMP_NUM_THREADS": "1",
        **more,
    }
    deployment = Deployment(folder, environment, port)
    try:
        deployment.start_api()
        yield deployment
    finally:
        deployment.stop()
        with server.connect() as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory,
    postgres_server: postgres.Postgres,
    _template: str,
    valkey_server: valkey.Valkey,
    model_folder: Path,
) -> Iterator[Deployment]:
    """A service with one training slot and one validation slot, shared by a module's tests."""
    folder = tmp_path_factory.mktemp("service")
    for deployment in deploy(folder, postgres_server, _template, valkey_server, model_folder):
        deployment.start("worker")
        yield deployment


@pytest.fixture(scope="module")
def user(service: Deployment) -> Iterator[User]:
    """A user of the module's service."""
    user = User(service)
    yield user
    user.close()
