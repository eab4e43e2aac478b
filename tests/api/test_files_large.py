"""A large upload costs neither memory nor the temporary folder."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import anyio
import httpx2
import pytest
from fastapi import FastAPI, UploadFile
from openai import OpenAI
from starlette.types import Message

from service.settings import Settings
from tests.api import forms
from tests.api.conftest import CHAT_LINE, ApiProcess, run_process

_MB = 1_000_000
_PIECE = CHAT_LINE * (_MB // len(CHAT_LINE))
MAX_GROWTH_BYTES = 50 * _MB


@pytest.fixture(autouse=True)
def _the_disk_gets_it_back(settings: Settings) -> Iterator[None]:
    """pytest keeps the folders of tests for a while."""
    yield
    shutil.rmtree(settings.data_dir / "blobs", ignore_errors=True)


def rss_bytes(api: ApiProcess, name: str) -> int:
    """Return VmRSS (now) or VmHWM (the most since `forget_peak`) of the process."""
    for line in Path(f"/proc/{api.pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(name)


def forget_peak(api: ApiProcess) -> None:
    Path(f"/proc/{api.pid}/clear_refs").write_text("5")


def big_form(pieces: int) -> Iterator[bytes]:
    yield forms.field("purpose", "fine-tune") + forms.file_start("big.jsonl")
    for _ in range(pieces):
        yield _PIECE
    yield b"\r\n" + forms.END


def upload(api: ApiProcess, settings: Settings, pieces: int) -> httpx2.Response:
    key = settings.first_key_file.read_text().strip()
    return httpx2.post(
        f"{api.url}/v1/files",
        content=big_form(pieces),
        headers=forms.CONTENT_TYPE | {"authorization": f"Bearer {key}"},
        timeout=300,
    )


def download(api: ApiProcess, settings: Settings, file_id: str) -> int:
    """Download a file piece by piece and return how many bytes came."""
    key = settings.first_key_file.read_text().strip()
    with httpx2.stream(
        "GET",
        f"{api.url}/v1/files/{file_id}/content",
        headers={"authorization": f"Bearer {key}"},
        timeout=300,
    ) as answer:
        return sum(len(piece) for piece in answer.iter_bytes())


@pytest.mark.parametrize(
    "megabytes", [80, pytest.param(500, marks=pytest.mark.slow)], ids=lambda n: f"{n}MB"
)
def test_a_large_file_goes_in_and_out_and_the_process_grows_by_at_most_50_mb(
    settings: Settings, tmp_path: Path, megabytes: int
) -> None:
    with run_process(settings, tmp_path / "api.log") as api:
        upload(api, settings, 1)  # whatever is loaded at the first upload is not counted
        before = rss_bytes(api, "VmRSS")
        forget_peak(api)

        answer = upload(api, settings, megabytes)
        grown_by_upload = rss_bytes(api, "VmHWM") - before
        received = download(api, settings, answer.json()["id"])
        grown = rss_bytes(api, "VmHWM") - before

        assert answer.status_code == 200
        assert answer.json()["bytes"] == received == megabytes * len(_PIECE)
        assert grown_by_upload <= MAX_GROWTH_BYTES, f"grew by {grown_by_upload / _MB:.0f} MB"
        assert grown <= MAX_GROWTH_BYTES, f"grew by {grown / _MB:.0f} MB in all"


@pytest.fixture
def no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be written to the temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", "/dev/full")
    with pytest.raises(OSError, match="/dev/full"), tempfile.TemporaryFile():
        pass


@pytest.mark.usefixtures("no_temporary_folder")
def test_a_full_temporary_folder_does_not_matter(client: OpenAI) -> None:
    file = client.files.create(file=("a.jsonl", _PIECE * 3), purpose="fine-tune")

    assert file.bytes == 3 * len(_PIECE)


@pytest.mark.usefixtures("no_temporary_folder")
def test_it_would_matter_if_the_route_took_an_uploadfile() -> None:
    """Shows that the test above can fail."""
    app = FastAPI()

    @app.post("/")
    async def spool(file: UploadFile) -> int:
        return file.size or 0

    body = forms.form(forms.file(_PIECE * 3))
    statuses: list[int] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "raw_path": b"/",
        "query_string": b"",
        "headers": [(b"content-type", forms.CONTENT_TYPE["content-type"].encode())],
    }
    with contextlib.suppress(OSError):
        anyio.run(app, scope, receive, send)

    assert statuses != [200]
