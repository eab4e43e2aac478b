"""Ctrl-C in a real process leaves the job alone."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from tests.nibble.conftest import ENDLESS, MODEL, Live, write_chat
from tests.nibble.proxy import Proxy


def start(live: Live, stderr: Path, *arguments: str) -> subprocess.Popen[bytes]:
    with stderr.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "nibble", *arguments],
            env=os.environ | live.environment,
            stdout=subprocess.PIPE,
            stderr=file,
        )


def wait_until_said(process: subprocess.Popen[bytes], stderr: Path, what: str) -> None:
    deadline = time.monotonic() + 90
    while what not in stderr.read_text():
        assert process.poll() is None, stderr.read_text()
        assert time.monotonic() < deadline, stderr.read_text()
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)
def test_an_interrupted_watch_leaves_the_job_and_says_how_to_watch_it_again(
    live: Live,
    client: openai.OpenAI,
    long_job: FineTuningJob,
    tmp_path: Path,
    sent: signal.Signals,
    code: int,
) -> None:
    stderr = tmp_path / "stderr"
    process = start(live, stderr, "jobs", "watch", long_job.id)
    wait_until_said(process, stderr, "Created fine-tuning job")

    process.send_signal(sent)
    stdout, _ = process.communicate(timeout=90)

    assert process.returncode == code
    assert stdout == b""
    assert f"nibble jobs watch {long_job.id}" in stderr.read_text()
    assert "Traceback" not in stderr.read_text()
    job = client.fine_tuning.jobs.retrieve(long_job.id)
    assert job.status in ("validating_files", "queued", "running")


def test_an_interrupted_create_leaves_the_job_it_made(
    live: Live, client: openai.OpenAI, tmp_path: Path
) -> None:
    file, stderr = write_chat(tmp_path / "long.jsonl", examples=ENDLESS), tmp_path / "stderr"
    options = ("--model", MODEL, "--epochs", "50", "--batch-size", "1", "--wait")
    process = start(live, stderr, "jobs", "create", str(file), *options)
    wait_until_said(process, stderr, "Created ftjob-")

    process.send_signal(signal.SIGINT)
    process.communicate(timeout=90)

    assert process.returncode == 130
    job_id = stderr.read_text().partition("nibble jobs watch ")[2].split()[0]
    job = client.fine_tuning.jobs.cancel(job_id)
    assert job.status in ("validating_files", "queued", "running", "cancelled")


def test_an_interrupted_download_says_how_to_fetch_the_rest(
    live: Live, proxy: Proxy, finished_job: FineTuningJob, tmp_path: Path
) -> None:
    proxy.cut("/adapter", after_bytes=9_000)
    proxy.cut("/adapter", after_bytes=0, times=1_000)
    stderr, folder = tmp_path / "stderr", tmp_path / "my adapter"
    away = replace(live, environment=live.environment | {"NIBBLE_BASE_URL": proxy.url})
    process = start(away, stderr, "jobs", "download", finished_job.id, str(folder))
    wait_until_said(process, stderr, "The download broke off")

    process.send_signal(signal.SIGINT)
    process.communicate(timeout=90)

    assert process.returncode == 130
    told = stderr.read_text().partition("Fetch the rest with: ")[2]
    assert told == f"nibble jobs download {finished_job.id} '{folder}'\n"
    assert not folder.exists()
