"""The five exit codes that scripts branch on, and that an error is one sentence on stderr."""

import http.server
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob
from typer.testing import Result

from tests.nibble.conftest import MODEL, write_chat

Run = Callable[..., Result]


@pytest.fixture
def elsewhere(user: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A user with a key, whose service is at an address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    user.setenv("NIBBLE_BASE_URL", f"http://127.0.0.1:{port}")
    user.setenv("NIBBLE_API_KEY", "sk-nibble-test")
    user.setattr("nibble.connection.RETRIES", 0)
    return user


def sentence(result: Result) -> str:
    """The one line on stderr that says what was wrong."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_0_a_job_that_succeeded_with_its_adapter_unpacked(
    nibble: Run, client: openai.OpenAI, training_file: Path, tmp_path: Path
) -> None:
    result = nibble(
        "jobs", "create", training_file, "--validation", training_file, "--model", MODEL,
        "--epochs", 2, "--batch-size", 4, "--lora-r", 4, "--seed", 7, "--suffix", "ci",
        "--metadata", "commit=abc", "--sample-prompt", "What comes after 3?",
        "--download", tmp_path / "adapter", "--json",
    )  # fmt: skip

    assert result.exit_code == 0, result.stderr
    job = json.loads(result.stdout)
    assert job["status"] == "succeeded"
    assert job["seed"] == 7
    assert job["metadata"] == {"commit": "abc"}
    assert job["hyperparameters"]["lora_r"] == 4
    assert job["fine_tuned_model"].startswith(f"ft:{MODEL}:")
    assert job["adapter"]["folder"] == str(tmp_path / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "manifest.json"} <= {
        path.name for path in (tmp_path / "adapter").iterdir()
    }
    for said in (
        "Fine-tuning job started",
        "Step 6/6: loss ",
        "tokens/s",
        "memory ",
        "  Q: What comes after 3?",
    ):
        assert said in result.stderr


def test_1_a_job_that_failed_with_every_bad_line(
    nibble: Run, client: openai.OpenAI, tmp_path: Path
) -> None:
    path = write_chat(tmp_path / "bad.jsonl")
    lines = path.read_text().splitlines()
    lines[2], lines[6] = '{"messages": [{"role": "user"', '{"messages": "none"}'
    path.write_text("\n".join(lines))

    result = nibble("jobs", "create", path, "--model", MODEL, "--wait")

    assert result.exit_code == 1, result.stderr
    assert "status:          failed" in result.stdout
    told = result.stdout.partition("error:")[2]
    assert "Training file, line 3: " in told
    assert "Training file, line 7: " in told


def test_3_a_job_that_was_cancelled(
    nibble: Run, client: openai.OpenAI, long_job: FineTuningJob
) -> None:
    threading.Timer(1.0, client.fine_tuning.jobs.cancel, [long_job.id]).start()

    result = nibble("jobs", "watch", long_job.id, "--json")

    assert result.exit_code == 3, result.stderr
    assert json.loads(result.stdout)["status"] == "cancelled"


REFUSED_BEFORE_ANYTHING_IS_SENT = {
    "no training file": ["jobs", "create", "--model", "m"],
    "no model": ["jobs", "create", "file-1"],
    "a training file that is not there": ["jobs", "create", "nowhere.jsonl", "--model", "m"],
    "a folder as training file": ["jobs", "create", "/", "--model", "m"],
    "an empty file name": ["jobs", "create", "", "--model", "m"],
    "an empty training file": ["jobs", "create", "/dev/null", "--model", "m"],
    "epochs that are no number": ["jobs", "create", "file-1", "--model", "m", "--epochs", "two"],
    "metadata without a value": ["jobs", "create", "file-1", "--model", "m", "--metadata", "x"],
    "a folder that is not empty": ["jobs", "download", "ftjob-1", "/"],
    "an empty id": ["jobs", "get", ""],
    "a command that is not there": ["jobs", "delete"],
    "an option that is not there": ["models", "list", "--api-key", "sk-x"],
    "an address that is none": ["models", "list", "--base-url", "ftp://host"],
}


@pytest.mark.parametrize(
    "arguments",
    REFUSED_BEFORE_ANYTHING_IS_SENT.values(),
    ids=REFUSED_BEFORE_ANYTHING_IS_SENT.keys(),
)
def test_2_refused_before_anything_is_sent(
    nibble: Run, elsewhere: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    result = nibble(*arguments)

    assert result.exit_code == 2, result.output  # and not 4: nobody listens there
    assert result.stdout == ""
    assert result.stderr


def test_2_a_pipe_is_refused_without_waiting_for_its_writer(
    nibble: Run, elsewhere: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "train.jsonl")

    result = nibble("files", "upload", tmp_path / "train.jsonl")

    assert result.exit_code == 2
    assert "not a regular file" in sentence(result)


def test_2_without_a_key_it_says_where_keys_come_from(
    nibble: Run, user: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    user.setenv("NIBBLE_DATA_DIR", str(tmp_path))

    result = nibble("jobs", "list")

    assert result.exit_code == 2
    assert "NIBBLE_API_KEY" in sentence(result)
    assert "nibble keys create" in sentence(result)


def test_2_a_wrong_key_is_named_by_its_source_and_never_shown(
    nibble: Run, client: openai.OpenAI, user: pytest.MonkeyPatch
) -> None:
    user.setenv("NIBBLE_API_KEY", "sk-nibble-wrong")

    result = nibble("jobs", "list", "--json")

    assert result.exit_code == 2
    assert "NIBBLE_API_KEY" in sentence(result)
    assert json.loads(result.stdout)["error"]["code"] == "invalid_api_key"
    assert "sk-nibble-wrong" not in result.output


def test_2_what_was_uploaded_for_a_job_that_is_refused_is_deleted_again(
    nibble: Run, client: openai.OpenAI, training_file: Path
) -> None:
    before = {file.id for file in client.files.list()}

    result = nibble("jobs", "create", training_file, "--model", MODEL, "--suffix", "a b/c" * 30)

    assert result.exit_code == 2, result.output
    assert "Uploaded" in result.stderr
    assert {file.id for file in client.files.list()} == before


REFUSED_BY_THE_SERVICE = {
    "an unknown model": (["create", "TRAIN", "--model", "gpt-9"], "gpt-9"),
    "an unknown file": (["create", "file-nowhere", "--model", MODEL], "file-nowhere"),
    "too many epochs": (["create", "TRAIN", "--model", MODEL, "--epochs", "51"], "n_epochs"),
    "an unknown hyperparameter": (
        ["create", "TRAIN", "--model", MODEL, "--hyperparameter", "speed=9"],
        "speed",
    ),
    "an unknown job": (["get", "ftjob-nowhere"], "ftjob-nowhere"),
    "an unknown job to watch": (["watch", "ftjob-nowhere"], "ftjob-nowhere"),
    "an unknown job to cancel": (["cancel", "ftjob-nowhere"], "ftjob-nowhere"),
    "an unknown job to pause": (["pause", "ftjob-nowhere"], "ftjob-nowhere"),
    "an unknown job to resume": (["resume", "ftjob-nowhere"], "ftjob-nowhere"),
    "an unknown job to download": (["download", "ftjob-nowhere"], "ftjob-nowhere"),
}


@pytest.mark.parametrize(
    ("arguments", "named"), REFUSED_BY_THE_SERVICE.values(), ids=REFUSED_BY_THE_SERVICE.keys()
)
def test_2_refused_by_the_service(
    nibble: Run,
    client: openai.OpenAI,
    user: pytest.MonkeyPatch,
    training_file: Path,
    arguments: list[str],
    named: str,
) -> None:
    user.chdir(training_file.parent)

    result = nibble("jobs", *[str(training_file) if a == "TRAIN" else a for a in arguments])

    assert result.exit_code == 2
    assert named in sentence(result)
    assert result.stdout == ""


def test_2_a_job_with_an_unknown_model_uploads_nothing(
    nibble: Run, client: openai.OpenAI, training_file: Path
) -> None:
    before = {file.id for file in client.files.list()}

    nibble("jobs", "create", training_file, "--model", "gpt-9")

    assert {file.id for file in client.files.list()} == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["models", "list"],
        ["files", "list"],
        ["jobs", "list"],
        ["jobs", "create", "file-1", "--model", "m"],
        ["jobs", "watch", "ftjob-1", "--timeout", "0"],
        ["jobs", "download", "ftjob-1", "adapter", "--timeout", "0"],
    ],
    ids=" ".join,
)
def test_4_nobody_listens(
    nibble: Run, elsewhere: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str]
) -> None:
    elsewhere.chdir(tmp_path)

    result = nibble(*arguments)

    assert result.exit_code == 4, result.output
    assert "cannot reach http://127.0.0.1:" in sentence(result)
    assert "nibble up" in sentence(result)


def test_4_giving_up_on_a_job_says_how_to_watch_it_again(
    nibble: Run, elsewhere: pytest.MonkeyPatch
) -> None:
    result = nibble("jobs", "watch", "ftjob-1", "--timeout", "0.6")

    assert result.exit_code == 4
    assert "nibble jobs watch ftjob-1" in sentence(result)


class _Web(http.server.BaseHTTPRequestHandler):
    """Some other server: it answers everything with the same body."""

    status = 200
    headers_sent: ClassVar[dict[str, str]] = {}
    body = b""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self.send_response(self.status)
        for name, value in self.headers_sent.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_POST = do_DELETE = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (the base class' name)
        pass


@contextmanager
def answering(status: int, headers: dict[str, str], body: bytes) -> Iterator[str]:
    """Some other server's address while the block runs."""
    handler = type("_", (_Web,), {"status": status, "headers_sent": headers, "body": body})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_2_what_a_service_says_not_to_try_again_is_refused_whatever_its_status(
    nibble: Run, elsewhere: pytest.MonkeyPatch
) -> None:
    headers = {"x-should-retry": "false", "content-type": "application/json"}
    with answering(507, headers, b'{"error": {"message": "The disk is full."}}') as url:
        elsewhere.setenv("NIBBLE_BASE_URL", url)

        result = nibble("jobs", "list")

    assert result.exit_code == 2
    assert sentence(result) == "Error: The disk is full."


@pytest.fixture(
    params=[
        ("text/html", b"<html>It works!</html>"),
        ("application/json", b"null"),
        ("application/json", b"[]"),
        ("application/json", b"not json"),
        ("application/json", b'{"data": [1]}'),
    ],
    ids=lambda answer: answer[1].decode(),
)
def web(request: pytest.FixtureRequest, elsewhere: pytest.MonkeyPatch) -> Iterator[None]:
    content_type, body = request.param
    with answering(200, {"content-type": content_type}, body) as url:
        elsewhere.setenv("NIBBLE_BASE_URL", url)
        yield


@pytest.mark.parametrize(
    "arguments",
    [
        ["models", "list"],
        ["files", "list"],
        ["files", "delete", "file-1"],
        ["jobs", "list"],
        ["jobs", "create", "file-1", "--model", "m"],
        ["jobs", "get", "ftjob-1"],
        ["jobs", "watch", "ftjob-1", "--timeout", "0"],
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("web")
def test_4_somebody_else_listens(nibble: Run, arguments: list[str]) -> None:
    result = nibble(*arguments)

    assert result.exit_code == 4, result.output
    assert "does not answer as" in sentence(result) or "no fine-tuning service" in sentence(result)
