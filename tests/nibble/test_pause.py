"""`nibble jobs pause` and `resume` over a whole service."""

import json
import time
from collections.abc import Callable

import openai
from openai.types.fine_tuning import FineTuningJob
from typer.testing import Result

Run = Callable[..., Result]


def wait_until_running(client: openai.OpenAI, job_id: str) -> None:
    deadline = time.monotonic() + 60
    while client.fine_tuning.jobs.retrieve(job_id).status != "running":
        assert time.monotonic() < deadline, "it does not run"
        time.sleep(0.1)


def test_a_running_job_is_paused_shown_as_paused_and_resumed(
    nibble: Run, client: openai.OpenAI, long_job: FineTuningJob
) -> None:
    wait_until_running(client, long_job.id)

    asked = nibble("jobs", "pause", long_job.id)
    deadline = time.monotonic() + 30
    while "paused" not in (shown := nibble("jobs", "get", long_job.id)).stdout:
        assert time.monotonic() < deadline, shown.stdout
        time.sleep(0.1)
    listed = nibble("jobs", "list")
    document = json.loads(nibble("jobs", "get", long_job.id, "--json").stdout)
    resumed = nibble("jobs", "resume", long_job.id)

    assert asked.exit_code == resumed.exit_code == 0
    assert f"nibble jobs get {long_job.id}" in asked.stderr
    row = next(line for line in listed.stdout.splitlines() if line.startswith(long_job.id))
    assert row.split("\t")[1] == "paused"
    assert document["status"] == "queued"  # as the API says it
    assert document["paused_at"]
    assert "paused" not in resumed.stdout
