"""A request's id is on its log lines and leads to the job that it made, whose id is on the lines of later calls."""

import json
from pathlib import Path
from typing import Any

from openai import OpenAI

from service.settings import Settings
from tests.api.conftest import CHAT_LINE, run_process


def _lines(log: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def test_a_create_calls_log_lines_join_the_requests_id_and_the_jobs(
    settings: Settings, tmp_path: Path
) -> None:
    log = tmp_path / "api.log"
    with run_process(settings, log) as api:
        key = settings.first_key_file.read_text().strip()
        with OpenAI(base_url=f"{api.url}/v1", api_key=key, max_retries=0) as client:
            file = client.files.create(file=("t.jsonl", CHAT_LINE * 12), purpose="fine-tune")
            job = client.fine_tuning.jobs.create(
                model="tiny-llama",
                training_file=file.id,
                extra_headers={"x-request-id": "from-outside-1"},
            )
            client.fine_tuning.jobs.retrieve(job.id, extra_headers={"x-request-id": "later-call-2"})

    (created,) = _lines(log, "job_created")
    assert (created["request_id"], created["job_id"]) == ("from-outside-1", job.id)
    by_id = {line["request_id"]: line for line in _lines(log, "request")}
    assert by_id["from-outside-1"]["status"] == 200
    assert by_id["later-call-2"]["job_id"] == job.id
