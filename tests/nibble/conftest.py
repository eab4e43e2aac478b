"""A whole service, started once per pytest process as a user would start it, and the client that speaks to it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob
from typer.testing import CliRunner, Result

from nibble.connection import connect
from nibble.follow import TERMINAL
from nibble.main import app
from nibble.submission import Submission, submit
from tests.nibble.proxy import Proxy
from tests.tiny_models import save_tiny_llama

MODEL = "tiny"
_START_S = 120
ENDLESS = 2000
"""Examples that no machine trains fifty times, one a step, while a test looks."""


@dataclass(frozen=True)
class Live:
    """A running service: its address, its port, and the environment of somebody who may use it."""

    url: str
    port: int
    environment: dict[str, str]


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The service with one worker and a random tiny model in its catalog."""
    folder = tmp_path_factory.mktemp("nibble-service")
    save_tiny_llama(folder / MODEL)
    (folder / "models.toml").write_text(f'[models.{MODEL}]\npath = "{MODEL}"\n')
    environment = os.environ | {
        "NIBBLE_MODELS_FILE": str(folder / "models.toml"),
        "NIBBLE_MIN_FREE_BYTES": "0",
        "OMP_NUM_THREADS": "1",
    }
    log = folder / "up.log"
    command = [
        sys.executable,
        "-m",
        "operations",
        "up",
        "--port",
        "0",
        "--data-dir",
        str(folder / "data"),
    ]
    with log.open("wb") as output:
        service = subprocess.Popen(command, env=environment, stderr=output, stdout=output)
    try:
        port = _port_when_ready(service, log)
        yield Live(
            f"http://127.0.0.1:{port}/v1",
            port,
            {
                "NIBBLE_BASE_URL": f"http://127.0.0.1:{port}/v1",
                "NIBBLE_DATA_DIR": str(folder / "data"),
            },
        )
    finally:
        service.send_signal(signal.SIGINT)
        try:
            service.wait(timeout=60)
        except subprocess.TimeoutExpired:
            service.kill()


def _port_when_ready(service: subprocess.Popen[bytes], log: Path) -> int:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and service.poll() is None:
        text = log.read_text()
        if found := re.search(r"API +http://127\.0\.0\.1:(\d+)/v1", text):
            return int(found[1])
        time.sleep(0.1)
    raise AssertionError(f"the service did not start:\n{log.read_text()}")


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The variables of this test's user; at first there are none that matter."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def client(live: Live, user: pytest.MonkeyPatch) -> openai.OpenAI:
    """The SDK's client, as the command line makes it; the user's variables point to the service from here on."""
    for name, value in live.environment.items():
        user.setenv(name, value)
    return connect(None)


@pytest.fixture
def proxy(live: Live, client: openai.OpenAI, user: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A breakable way to the service; the user's variables point to it."""
    with Proxy(live.port) as proxy:
        user.setenv("NIBBLE_BASE_URL", proxy.url)
        yield proxy


@pytest.fixture
def nibble() -> Callable[..., Result]:
    """Run the command line in this process; the result has exit_code, stdout and stderr."""
    runner = CliRunner()

    def run(*arguments: object) -> Result:
        result = runner.invoke(app, [str(argument) for argument in arguments])
        assert "Traceback" not in result.output
        return result

    return run


def write_chat(path: Path, *, examples: int = 12, length: int = 3) -> Path:
    """A training file of short chat examples."""
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"What comes after {i}?"},
                {"role": "assistant", "content": f"{i + 1} comes next. " * length},
            ]
        }
        for i in range(examples)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def training_file(tmp_path: Path) -> Path:
    """Twelve examples, trained in a moment."""
    return write_chat(tmp_path / "train.jsonl")


@pytest.fixture
def long_job(client: openai.OpenAI, tmp_path: Path) -> Iterator[FineTuningJob]:
    """A job that is still being worked on when the test looks, and is cancelled at the test's end."""
    path = write_chat(tmp_path / "long.jsonl", examples=ENDLESS)
    uploaded = client.files.create(file=path, purpose="fine-tune")
    wanted = {"n_epochs": 50, "batch_size": 1}
    job = submit(client, Submission(MODEL, uploaded.id, hyperparameters=wanted))
    yield job
    with suppress(openai.BadRequestError):  # it has ended already
        client.fine_tuning.jobs.cancel(job.id)


@pytest.fixture(scope="session")
def finished_job_id(live: Live, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A job that has succeeded, with a checkpoint per epoch and a story of some dozen events."""
    path = write_chat(tmp_path_factory.mktemp("finished") / "train.jsonl", examples=24)
    key = Path(live.environment["NIBBLE_DATA_DIR"], "first-api-key").read_text().strip()
    with openai.OpenAI(base_url=live.url, api_key=key) as client:
        uploaded = client.files.create(file=path, purpose="fine-tune")
        wanted = {"n_epochs": 3, "batch_size": 4}
        job = submit(client, Submission(MODEL, uploaded.id, hyperparameters=wanted))
        deadline = time.monotonic() + 120
        while job.status not in TERMINAL and time.monotonic() < deadline:
            time.sleep(0.2)
            job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
    return job.id


@pytest.fixture
def finished_job(client: openai.OpenAI, finished_job_id: str) -> FineTuningJob:
    """The same, read through this test's client."""
    return client.fine_tuning.jobs.retrieve(finished_job_id)
