"""`nibble queue` and `nibble workers` over a whole service."""

import json
import time
from collections.abc import Callable

import openai
from openai.types.fine_tuning import FineTuningJob
from typer.testing import Result

Run = Callable[..., Result]


def test_the_queue_shows_what_runs_and_the_place_of_what_waits(
    nibble: Run, client: openai.OpenAI, long_job: FineTuningJob
) -> None:
    waiting = client.fine_tuning.jobs.create(
        model=long_job.model, training_file=long_job.training_file
    )
    deadline = time.monotonic() + 90
    while client.fine_tuning.jobs.retrieve(waiting.id).status != "queued":
        assert time.monotonic() < deadline, "it is not validated"
        time.sleep(0.1)

    shown = nibble("queue")
    document = json.loads(nibble("queue", "--json").stdout)
    client.fine_tuning.jobs.cancel(waiting.id)

    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in shown.stdout.splitlines()}
    assert rows[long_job.id][0] == "running"
    assert rows[waiting.id][:2] == ["queued", "1"]
    assert "Of other projects 0 run and 0 wait" in shown.stderr
    assert [job["id"] for job in document["data"]][:1] == [long_job.id]


def test_the_workers_are_shown_with_their_devices(nibble: Run, client: openai.OpenAI) -> None:
    deadline = time.monotonic() + 90
    while not json.loads(nibble("workers", "--json").stdout)["data"]:
        assert time.monotonic() < deadline, "no worker has come"
        time.sleep(0.1)

    shown = nibble("workers")
    (worker,) = json.loads(nibble("workers", "--json").stdout)["data"]

    assert shown.exit_code == 0
    (row,) = [line.split("\t") for line in shown.stdout.splitlines() if worker["id"] in line]
    assert row[2] == "online"
    assert len(worker["devices"]) == worker["train_slots"]
    assert row[6] == ", ".join(device["name"] for device in worker["devices"])
