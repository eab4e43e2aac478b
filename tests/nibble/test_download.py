"""Fetching an adapter over connections that break."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import openai
from openai.types.fine_tuning import FineTuningJob
from typer.testing import Result

from tests.nibble.proxy import Proxy

Run = Callable[..., Result]


def assert_whole(folder: Path) -> None:
    """Every file is as the manifest says, and nothing else is there."""
    manifest = json.loads((folder / "manifest.json").read_text())
    listed = {file["name"]: file["sha256"] for file in manifest["files"]}
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    assert found == listed
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(found)


def test_an_adapter_is_unpacked_and_told_as_json(
    nibble: Run, client: openai.OpenAI, finished_job: FineTuningJob, tmp_path: Path
) -> None:
    result = nibble("jobs", "download", finished_job.id, tmp_path / "adapter", "--json")

    assert result.exit_code == 0, result.stderr
    assert_whole(tmp_path / "adapter")
    told = json.loads(result.stdout)
    assert told["folder"] == str(tmp_path / "adapter")
    assert {file["name"] for file in told["files"]} == {
        path.name for path in (tmp_path / "adapter").iterdir()
    }
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_checkpoint_is_listed_and_downloaded(
    nibble: Run, client: openai.OpenAI, finished_job: FineTuningJob, tmp_path: Path
) -> None:
    listed = json.loads(nibble("jobs", "checkpoints", finished_job.id, "--json").stdout)["data"]
    first = listed[-1]

    result = nibble(
        "jobs", "download", finished_job.id, tmp_path / "adapter", "--checkpoint", first["id"]
    )

    assert result.exit_code == 0, result.stderr
    assert_whole(tmp_path / "adapter")
    manifest = json.loads((tmp_path / "adapter" / "manifest.json").read_text())
    assert manifest["step"] == first["step_number"]


def test_a_download_that_breaks_goes_on_where_it_stopped(
    nibble: Run, proxy: Proxy, finished_job: FineTuningJob, tmp_path: Path
) -> None:
    proxy.cut("/adapter", after_bytes=9_000, times=3)

    result = nibble("jobs", "download", finished_job.id, tmp_path / "adapter")

    assert result.exit_code == 0, result.stderr
    assert_whole(tmp_path / "adapter")
    requests = [head.lower() for head in proxy.seen("/adapter")]
    assert len(requests) == 4
    assert all("range: bytes=" in head and "if-range: " in head for head in requests[1:])


def test_another_run_goes_on_where_the_first_one_gave_up(
    nibble: Run, proxy: Proxy, finished_job: FineTuningJob, tmp_path: Path
) -> None:
    proxy.cut("/adapter", after_bytes=9_000)
    proxy.cut("/adapter", after_bytes=0, times=50)
    given_up = nibble("jobs", "download", finished_job.id, tmp_path / "adapter", "--timeout", 0.2)
    kept = {path.name: path.stat().st_size for path in tmp_path.iterdir()}

    proxy.heal()
    result = nibble("jobs", "download", finished_job.id, tmp_path / "adapter")

    assert given_up.exit_code == 4
    assert any(size > 5_000 for size in kept.values())
    assert result.exit_code == 0, result.stderr
    assert_whole(tmp_path / "adapter")
    assert "range: bytes=0-" not in proxy.seen("/adapter")[-1].lower()
    assert "range: bytes=" in proxy.seen("/adapter")[-1].lower()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_damaged_part_is_found_out_and_fetched_anew(
    nibble: Run, proxy: Proxy, finished_job: FineTuningJob, tmp_path: Path
) -> None:
    proxy.cut("/adapter", after_bytes=9_000)
    proxy.cut("/adapter", after_bytes=0, times=50)
    nibble("jobs", "download", finished_job.id, tmp_path / "adapter", "--timeout", 0.2)
    proxy.heal()
    part = next(path for path in tmp_path.iterdir() if path.suffix == ".part")
    content = bytearray(part.read_bytes())
    content[5_000] ^= 1
    part.write_bytes(content)

    damaged = nibble("jobs", "download", finished_job.id, tmp_path / "adapter")
    left = list(tmp_path.iterdir())
    again = nibble("jobs", "download", finished_job.id, tmp_path / "adapter")

    assert damaged.exit_code == 1
    assert "sha256" in damaged.stderr or "cannot be read" in damaged.stderr
    assert left == []
    assert again.exit_code == 0
    assert_whole(tmp_path / "adapter")


def test_the_part_of_another_archive_is_not_gone_on_with(
    nibble: Run, client: openai.OpenAI, finished_job: FineTuningJob, tmp_path: Path
) -> None:
    part = tmp_path / f".adapter.{finished_job.id}.part"
    part.write_bytes(b"of another one" * 100)
    part.with_name(part.name + ".etag").write_text('"tar1-another"')

    result = nibble("jobs", "download", finished_job.id, tmp_path / "adapter")

    assert result.exit_code == 0, result.stderr
    assert_whole(tmp_path / "adapter")


def test_a_job_without_an_adapter_is_refused(
    nibble: Run, client: openai.OpenAI, long_job: FineTuningJob, tmp_path: Path
) -> None:
    result = nibble("jobs", "download", long_job.id, tmp_path / "adapter")

    assert result.exit_code == 2
    assert "no adapter" in result.stderr
    assert list(tmp_path.glob("*adapter*")) == []
