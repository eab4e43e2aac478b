"""Repeated create calls, as clients really send them."""

import httpx2
import openai
import pytest
from openai import OpenAI

from service.settings import Settings
from tests.api.conftest import CHAT_LINE, serve

JOBS = "/v1/fine_tuning/jobs"


class LosesAnswers(httpx2.HTTPTransport):
    """A network that loses the answers to the first `losses` job creations, after they have been served."""

    def __init__(self, losses: int) -> None:
        super().__init__()
        self._losses = losses
        self.sent: list[str] = []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        answer = super().handle_request(request)
        if request.method == "POST" and request.url.path == JOBS:
            self.sent.append(request.headers["x-stainless-retry-count"])
            if self._losses:
                self._losses -= 1
                answer.read()
                answer.close()
                raise httpx2.ReadTimeout("lost", request=request)
        return answer


def test_the_sdks_retry_after_a_lost_answer_makes_no_second_job(
    base_url: str, key: str, training_file: str
) -> None:
    network = LosesAnswers(losses=2)
    with OpenAI(
        base_url=f"{base_url}/v1", api_key=key, http_client=httpx2.Client(transport=network)
    ) as client:
        job = client.fine_tuning.jobs.create(model="tiny-llama", training_file=training_file)

        assert network.sent == ["0", "1", "2"]
        assert [listed.id for listed in client.fine_tuning.jobs.list()] == [job.id]


def test_an_idempotency_key_is_honoured_and_not_to_be_reused(
    http: httpx2.Client, training_file: str
) -> None:
    headers = {"idempotency-key": "release 7"}
    body = {"model": "tiny-llama", "training_file": training_file}

    first = http.post(JOBS, json=body, headers=headers)
    again = http.post(JOBS, json=body, headers=headers)
    other = http.post(JOBS, json=body | {"seed": 1}, headers=headers)

    assert first.json()["id"] == again.json()["id"]
    assert other.status_code == 400
    assert other.json()["error"]["code"] == "idempotency_key_reused"
    assert other.headers["x-should-retry"] == "false"


def test_too_many_waiting_jobs_are_refused_and_the_sdk_does_not_insist(
    settings: Settings,
) -> None:
    with serve(settings.model_copy(update={"max_waiting_jobs": 1})) as url:
        key = settings.first_key_file.read_text().strip()
        with OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=5) as client:
            file = client.files.create(file=("t.jsonl", CHAT_LINE), purpose="fine-tune").id
            first = client.fine_tuning.jobs.create(model="tiny-llama", training_file=file)

            with pytest.raises(openai.RateLimitError) as refusal:
                client.fine_tuning.jobs.create(model="tiny-llama", training_file=file)

            assert refusal.value.code == "too_many_waiting_jobs"
            assert refusal.value.response.headers["x-should-retry"] == "false"
            assert refusal.value.request.headers["x-stainless-retry-count"] == "0"
            client.fine_tuning.jobs.cancel(first.id)
            assert client.fine_tuning.jobs.create(model="tiny-llama", training_file=file)
