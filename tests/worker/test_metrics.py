"""What a worker tells Prometheus: what its attempts do, over a real port."""

import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from service.settings import Settings
from tests.free_port import free_port
from tests.worker.conftest import Await, Submit, chat_lines
from worker.crew import Crew
from worker.gpu import Gpu
from worker.metrics import GpuCollector, WorkerMetrics, serve


@pytest.fixture
def served(settings: Settings) -> Settings:
    """Settings with a port for metrics."""
    return settings.model_copy(update={"worker_metrics_port": free_port()})


def _read(settings: Settings, path: str = "/metrics", **headers: str) -> str:
    url = f"http://127.0.0.1:{settings.worker_metrics_port}{path}"
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        return answer.read().decode()


def _value(text: str, name: str, **labels: str) -> float | None:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    return None


def test_a_job_is_counted_from_its_claims_to_its_last_step(
    crew: Crew, submit: Submit, await_job: Await, served: Settings, story: Callable[..., list[Any]]
) -> None:
    stop = serve(crew.context.metrics.registry, served)
    job_id = submit(chat_lines(10), hyperparameters={"n_epochs": 1, "batch_size": 5})
    await_job(job_id)
    crew.stop()  # its last lines are counted

    text = _read(served)

    stop()
    steps = [
        event for event in story(job_id) if event.type == "metrics" and "step_time_s" in event.data
    ]
    assert _value(text, "nibble_worker_claims_total", kind="validate") == 1
    assert _value(text, "nibble_worker_claims_total", kind="train") == 1
    ended = "nibble_worker_attempts_ended_total"
    assert _value(text, ended, kind="train", outcome="succeeded") == 1
    assert _value(text, "nibble_worker_step_seconds_count") == len(steps) > 0
    assert job_id not in text


def test_no_port_means_no_server_and_a_taken_one_is_told_and_left(
    settings: Settings, served: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    registry = WorkerMetrics().registry
    serve(registry, settings)()
    stop = serve(registry, served)

    serve(registry, served)()

    assert _read(served)
    stop()
    with pytest.raises(urllib.error.URLError):
        _read(served)


def test_the_token_is_asked_for_and_other_addresses_are_not_there(served: Settings) -> None:
    closed = served.model_copy(update={"metrics_token": SecretStr("s3cret")})
    stop = serve(WorkerMetrics().registry, closed)

    with pytest.raises(urllib.error.HTTPError) as refused:
        _read(closed)
    with pytest.raises(urllib.error.HTTPError) as missing:
        _read(closed, "/", authorization="Bearer s3cret")
    opened = _read(closed, authorization="Bearer s3cret")

    stop()
    assert (refused.value.code, missing.value.code) == (403, 404)
    refused.value.close()
    missing.value.close()
    assert "nibble_worker_step_seconds" in opened


def test_a_gpu_that_does_not_answer_is_left_out() -> None:
    gone = Gpu(uuid="GPU-none", name="none", memory_bytes=1)

    families = list(GpuCollector([gone]).collect())

    assert [family.samples for family in families] == [[], [], []]
