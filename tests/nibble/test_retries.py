"""Requests whose answer is lost on the way are sent again without doing their work twice."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import openai
from typer.testing import Result

from tests.nibble.conftest import MODEL
from tests.nibble.proxy import Proxy

Run = Callable[..., Result]


def test_a_create_whose_answer_is_lost_makes_one_job(
    nibble: Run, client: openai.OpenAI, proxy: Proxy, training_file: Path
) -> None:
    file_id = client.files.create(file=training_file, purpose="fine-tune").id
    before = {job.id for job in client.fine_tuning.jobs.list()}
    proxy.cut("POST /v1/fine_tuning/jobs", after_bytes=0, times=2)

    result = nibble("jobs", "create", file_id, "--model", MODEL, "--json")

    assert result.exit_code == 0, result.stderr
    job_id = json.loads(result.stdout)["id"]
    assert len(proxy.seen("^POST")) == 3
    assert {job.id for job in client.fine_tuning.jobs.list()} - before == {job_id}
    with suppress(openai.BadRequestError):  # it has ended already
        client.fine_tuning.jobs.cancel(job_id)


def test_an_upload_that_breaks_off_is_sent_again_whole(
    nibble: Run, client: openai.OpenAI, proxy: Proxy, training_file: Path
) -> None:
    proxy.cut("POST /v1/files", after_bytes=0)

    result = nibble("files", "upload", training_file)

    assert result.exit_code == 0, result.stderr
    assert client.files.content(result.stdout.strip()).read() == training_file.read_bytes()
