"""Where a base model's files are: a folder of ours, or a commit on the hub, by the real hub client."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from qlora_core.errors import ModelWeightsMissing, ModelWeightsPickle
from qlora_core.models.files import find_shards
from service.models.actions import ModelUnavailable, resolve_folder
from service.models.catalog import BaseModel

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RESOLVE = """
import os
import sys
from pathlib import Path
from service.models.actions import ModelUnavailable, file_names, resolve_folder
from service.models.catalog import BaseModel
model = BaseModel("far-llama", None, "somebody/far-llama", sys.argv[1], 0)
try:
    cache = Path(sys.argv[2])
    folder = resolve_folder(model, cache, weights="WEIGHTS" not in os.environ)
    print(folder)
    if "WEIGHTS" in os.environ:
        print(*file_names(model, folder, cache))
except ModelUnavailable as error:
    sys.exit(str(error))
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download needs: a tree, and files."""

    FILES: ClassVar[dict[str, bytes]] = {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors": b"\x00" * 1000,
        "chat_template.jinja": b"{{ messages }}",
        "pytorch_model.bin": b"a pickle",
        "modeling_far.py": b"raise SystemExit('code from the hub was run')",
    }

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        tree = [
            {"type": "file", "path": name, "size": len(content), "oid": f"{i:040x}"}
            for i, (name, content) in enumerate(self.FILES.items())
        ]
        name = path.rsplit("/", 1)[-1]
        if path == f"/api/models/somebody/far-llama/tree/{COMMIT}":
            body, kind = json.dumps(tree).encode(), "application/json"
        elif path == f"/api/models/somebody/far-llama/revision/{COMMIT}":
            siblings = [{"rfilename": known} for known in self.FILES]
            body = json.dumps({"sha": COMMIT, "id": "somebody/far-llama", "siblings": siblings})
            body, kind = body.encode(), "application/json"
        elif path == f"/somebody/far-llama/resolve/{COMMIT}/{name}" and name in self.FILES:
            body, kind = self.FILES[name], "application/octet-stream"
        else:
            self.send_response(404)
            self.send_header("x-error-code", "RevisionNotFound")
            self.send_header("content-length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.send_header("x-repo-commit", COMMIT)
        self.send_header("etag", f'"{name}"')
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def resolve_elsewhere(
    folder: Path, revision: str = COMMIT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Resolve in a process of its own: the hub's client reads its environment at import."""
    return subprocess.run(
        [sys.executable, "-c", RESOLVE, revision, str(folder)],
        env={
            "HOME": str(folder),
            "PYTHONPATH": str(Path.cwd()),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_folder_of_ours_is_given_as_it_is(tmp_path: Path) -> None:
    model = BaseModel("tiny", tmp_path, None, None, 0)

    assert resolve_folder(model, tmp_path / "cache") == tmp_path


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    model = BaseModel("tiny", tmp_path / "nowhere", None, None, 0)

    with pytest.raises(ModelUnavailable, match=r"model tiny: the folder .*nowhere of models.toml"):
        resolve_folder(model, tmp_path / "cache")


def test_only_weights_json_and_templates_are_downloaded_and_once(tmp_path: Path, hub: str) -> None:
    first = resolve_elsewhere(tmp_path, HF_ENDPOINT=hub)
    again = resolve_elsewhere(tmp_path, HF_HUB_OFFLINE="1")

    assert first.returncode == 0, first.stderr
    folder = Path(first.stdout.strip())
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "chat_template.jinja",
    }
    assert again.stdout == first.stdout, again.stderr


def test_without_weights_only_their_names_are_fetched(tmp_path: Path, hub: str) -> None:
    done = resolve_elsewhere(tmp_path, HF_ENDPOINT=hub, WEIGHTS="0")

    assert done.returncode == 0, done.stderr
    folder, *names = done.stdout.split()
    assert {path.name for path in Path(folder).iterdir()} == {"config.json", "chat_template.jinja"}
    assert set(names) == set(Hub.FILES)
    shards, _ = find_shards(Path(folder), names)
    assert [shard.name for shard in shards] == ["model.safetensors"]
    with pytest.raises(ModelWeightsPickle):
        find_shards(Path(folder), set(names) - {"model.safetensors"})
    with pytest.raises(ModelWeightsMissing):
        find_shards(Path(folder), {"config.json"})


def test_an_unknown_commit_is_told_in_one_sentence(tmp_path: Path, hub: str) -> None:
    done = resolve_elsewhere(tmp_path, "f" * 40, HF_ENDPOINT=hub)

    assert done.returncode == 1
    assert "model far-llama: somebody/far-llama at revision ffff" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_the_network_it_says_what_to_do(tmp_path: Path) -> None:
    done = resolve_elsewhere(tmp_path, HF_HUB_OFFLINE="1")

    assert done.returncode == 1
    assert done.stderr.startswith("model far-llama: somebody/far-llama at revision 0123")
    assert "cannot be fetched from the hub" in done.stderr
    assert "path in models.toml" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow  # the hub's client tries for 23 seconds
def test_a_hub_that_does_not_answer_says_what_to_do(tmp_path: Path) -> None:
    done = resolve_elsewhere(tmp_path, HF_ENDPOINT="http://127.0.0.1:1")

    assert done.returncode == 1
    assert "cannot be fetched from the hub" in done.stderr
    assert "Traceback" not in done.stderr
