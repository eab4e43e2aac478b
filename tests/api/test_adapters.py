"""Adapter download: whole, in parts, and not again."""

import hashlib
import io
import itertools
import json
import subprocess
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import OpenAI

from service.settings import Settings
from tests.hand_worker import WEIGHTS, HandWorker


@pytest.fixture
def job_id(client: OpenAI, training_file: str) -> str:
    return client.fine_tuning.jobs.create(model="tiny-llama", training_file=training_file).id


@pytest.fixture
def url(job_id: str, worker: HandWorker) -> str:
    """The address of a succeeded job's adapter."""
    worker.succeed(worker.start())
    return f"/v1/fine_tuning/jobs/{job_id}/adapter"


def unpack(content: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        found = {}
        for member in archive.getmembers():
            file = archive.extractfile(member)
            assert file is not None
            found[member.name] = file.read()
    return found


def test_the_whole_adapter_comes_as_a_tar_of_one_folder(
    http: httpx2.Client, url: str, job_id: str
) -> None:
    answer = http.get(url)

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-tar"
    assert answer.headers["content-length"] == str(len(answer.content))
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-disposition"] == f'attachment; filename="{job_id}.tar"'
    files = unpack(answer.content)
    assert list(files) == [
        f"{job_id}/{name}"
        for name in (
            "adapter_config.json",
            "adapter_model.safetensors",
            "empty.txt",
            "manifest.json",
        )
    ]
    assert files[f"{job_id}/adapter_model.safetensors"] == WEIGHTS


def test_the_manifest_names_every_file_and_the_etag_names_the_manifest(
    http: httpx2.Client, url: str, job_id: str
) -> None:
    answer = http.get(url)

    files = unpack(answer.content)
    text = files.pop(f"{job_id}/manifest.json")
    manifest: dict[str, Any] = json.loads(text)
    assert manifest["job"] == job_id
    assert manifest["base_model"] == "tiny-llama"
    assert manifest["step"] == 10
    assert manifest["versions"]["tokenizers"] == version("tokenizers")
    assert manifest["files"] == [
        {
            "name": name.removeprefix(f"{job_id}/"),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        for name, content in files.items()
    ]
    assert hashlib.sha256(text).hexdigest() in answer.headers["etag"]


def test_head_says_what_get_would(http: httpx2.Client, url: str) -> None:
    got, head = http.get(url), http.head(url)

    assert head.status_code == 200
    assert head.content == b""
    for name in ("content-length", "etag", "content-type", "accept-ranges", "content-disposition"):
        assert head.headers[name] == got.headers[name]


def test_a_part_is_sent_as_asked(http: httpx2.Client, url: str) -> None:
    whole = http.get(url).content
    cases: dict[str, tuple[int, int | None]] = {
        "bytes=0-0": (0, 1),
        "bytes=0-511": (0, 512),
        "bytes=100-3000": (100, 3001),
        "bytes=700-": (700, None),
        "bytes=-1": (-1, None),
        "bytes=-5000": (-5000, None),
        "bytes=-99999999": (0, None),
        "bytes=5-99999999": (5, None),
        "BYTES=5-6": (5, 7),
    }

    for asked, (start, end) in cases.items():
        part = http.get(url, headers={"range": asked})

        assert part.status_code == 206, asked
        assert part.content == whole[start:end], asked
        first = start if start >= 0 else len(whole) + start
        last = first + len(part.content) - 1
        assert part.headers["content-range"] == f"bytes {first}-{last}/{len(whole)}"
        assert part.headers["content-length"] == str(len(part.content))


def test_a_part_beyond_the_end_is_a_416(http: httpx2.Client, url: str) -> None:
    size = len(http.get(url).content)

    for asked in ("bytes=99999999-", "bytes=-0"):
        answer = http.get(url, headers={"range": asked})

        assert answer.status_code == 416
        assert answer.headers["content-range"] == f"bytes */{size}"
        assert answer.json()["error"]["code"] == "range_not_satisfiable"


def test_a_range_we_do_not_serve_gets_the_whole(http: httpx2.Client, url: str) -> None:
    whole = http.get(url).content

    for asked in ("bytes=0-1,5-6", "lines=1-2", "bytes=x", "bytes=9-3", ""):
        answer = http.get(url, headers={"range": asked})

        assert answer.status_code == 200, asked
        assert answer.content == whole, asked


def test_a_part_depends_on_if_range(http: httpx2.Client, url: str) -> None:
    etag = http.head(url).headers["etag"]

    same = http.get(url, headers={"range": "bytes=0-9", "if-range": etag})
    other = http.get(url, headers={"range": "bytes=0-9", "if-range": '"other"'})
    date = http.get(
        url, headers={"range": "bytes=0-9", "if-range": "Wed, 21 Oct 2026 07:28:00 GMT"}
    )

    assert (same.status_code, len(same.content)) == (206, 10)
    assert (other.status_code, date.status_code) == (200, 200)


def test_what_the_client_has_is_not_sent_again(http: httpx2.Client, url: str) -> None:
    etag = http.head(url).headers["etag"]

    for known in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        answer = http.get(url, headers={"if-none-match": known})
        assert (answer.status_code, answer.content) == (304, b""), known
        assert answer.headers["etag"] == etag
    assert http.get(url, headers={"if-none-match": '"x"'}).status_code == 200


def test_a_download_cut_off_anywhere_can_be_put_together(http: httpx2.Client, url: str) -> None:
    whole = http.get(url)
    cuts = [0, 1, 511, 513, 1024, 9_999, len(whole.content)]

    parts = [
        http.get(url, headers={"range": f"bytes={a}-{b - 1}", "if-range": whole.headers["etag"]})
        for a, b in itertools.pairwise(cuts)
    ]

    assert b"".join(part.content for part in parts) == whole.content


def test_a_job_that_offers_its_best_adapter_serves_that_one_though_later_checkpoints_exist(
    http: httpx2.Client, job_id: str, worker: HandWorker
) -> None:
    run = worker.start()
    worker.checkpoint(run, 4)
    worker.checkpoint(run, 10)
    worker.succeed(run, step=4)

    answer = http.get(f"/v1/fine_tuning/jobs/{job_id}/adapter")

    manifest: dict[str, Any] = json.loads(unpack(answer.content)[f"{job_id}/manifest.json"])
    assert manifest["step"] == 4


def test_before_success_there_is_no_adapter_but_a_checkpoints(
    http: httpx2.Client, job_id: str, worker: HandWorker
) -> None:
    url = f"/v1/fine_tuning/jobs/{job_id}/adapter"
    run = worker.start()
    checkpoint = worker.checkpoint(run, 4)

    early = http.get(url)
    kept = http.get(url, params={"checkpoint": checkpoint.id})
    worker.fail(run)
    late = http.get(url)

    for answer, status in ((early, "running"), (late, "failed")):
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "adapter_not_ready"
        assert f"is {status}" in answer.json()["error"]["message"]
    assert kept.status_code == 200
    assert f"{job_id}-step-4/adapter_model.safetensors" in unpack(kept.content)
    unknown = http.get(url, params={"checkpoint": "ftckpt_none"})
    assert unknown.status_code == 404
    assert unknown.json()["error"]["param"] == "checkpoint"


def test_another_projects_adapter_does_not_exist(
    other_team: OpenAI, base_url: str, url: str
) -> None:
    answer = httpx2.get(base_url + url, headers={"authorization": f"Bearer {other_team.api_key}"})

    assert answer.status_code == 404


def test_an_adapter_whose_files_are_gone_is_a_404_before_the_first_byte(
    http: httpx2.Client, url: str, settings: Settings
) -> None:
    blob = next((settings.data_dir / "blobs").rglob("adapter_model.safetensors"))
    blob.write_bytes(b"cut short")

    answer = http.get(url)

    assert answer.status_code == 404
    assert "not there any more" in answer.json()["error"]["message"]


def test_gnu_tar_unpacks_it(http: httpx2.Client, url: str, job_id: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(http.get(url).content)

    done = subprocess.run(
        ["tar", "xf", "a.tar"], cwd=tmp_path, capture_output=True, text=True, timeout=20
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / job_id / "adapter_model.safetensors").read_bytes() == WEIGHTS
