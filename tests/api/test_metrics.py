"""What the API tells Prometheus, and whom."""

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from sqlalchemy.orm import Session

from service.queue.workers import WorkerSlots, sign_in
from service.settings import Settings
from tests.api.conftest import serve
from tests.job_row import add_job

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def _scrape(url: str, **headers: str) -> Samples:
    answer = httpx2.get(f"{url}/metrics", headers=headers, timeout=30)
    assert answer.status_code == 200, answer.text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def _value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, tuple(sorted(labels.items()))))


def test_jobs_workers_and_leases_are_counted_over_all_projects_as_the_database_has_them(
    base_url: str, session: Session
) -> None:
    slots = WorkerSlots(train=2, validate=1)
    sign_in(session, worker_id="worker_here", host="here", pid=1, slots=slots)
    add_job(session)
    add_job(session)
    add_job(session, status="running", lease_owner="worker_here")
    session.commit()

    samples = _scrape(base_url)

    assert _value(samples, "nibble_database_up") == 1
    assert _value(samples, "nibble_jobs", status="queued") == 2
    assert _value(samples, "nibble_jobs", status="running") == 1
    assert _value(samples, "nibble_jobs", status="paused") == 0
    assert _value(samples, "nibble_workers", state="heard") == 1
    assert _value(samples, "nibble_slots", kind="train") == 2
    assert _value(samples, "nibble_slots_busy", kind="train") == 1
    assert _value(samples, "nibble_leases_overdue") == 0
    age_s = _value(samples, "nibble_jobs_oldest_seconds", status="queued")
    assert age_s is not None
    assert 0 <= age_s < 300


def test_requests_are_told_by_their_routes_template_and_no_id_or_address_is_a_label(
    base_url: str, key: str
) -> None:
    with httpx2.Client(base_url=base_url, headers={"authorization": f"Bearer {key}"}) as client:
        client.get("/v1/files/file-of-somebody")
        client.get("/v1/fine_tuning/jobs/ftjob-secret/events")
        client.get("/made/up/address")
        client.get("/v1/files", headers={"authorization": "Bearer wrong"})
    text = httpx2.get(f"{base_url}/metrics", timeout=30).text

    samples = _scrape(base_url)

    def count(route: str, status: str) -> float | None:
        name = "nibble_http_request_seconds_count"
        return _value(samples, name, method="GET", route=route, status=status)

    assert count("/v1/files/{file_id}", "404") == 1
    assert count("/v1/fine_tuning/jobs/{job_id}/events", "404") == 1
    assert count("unknown", "404") == 1
    assert count("unknown", "401") == 1, "refused before any route was looked for"
    for private in ("file-of-somebody", "ftjob-secret", "made/up", "proj_default"):
        assert private not in text


def test_with_a_token_only_who_sends_it_reads(settings: Settings) -> None:
    with serve(settings.model_copy(update={"metrics_token": SecretStr("s3cret")})) as url:
        without = httpx2.get(f"{url}/metrics", timeout=30)
        wrong = httpx2.get(f"{url}/metrics", headers={"authorization": "Bearer s3cre"}, timeout=30)
        samples = _scrape(url, authorization="Bearer s3cret")

    assert (without.status_code, wrong.status_code) == (403, 403)
    assert "NIBBLE_METRICS_TOKEN" in without.json()["error"]["message"]
    assert _value(samples, "nibble_database_up") == 1


@pytest.mark.parametrize("header", ["x-forwarded-for", "forwarded", "via", "x-real-ip"])
def test_without_a_token_a_proxy_on_this_machine_does_not_open_them(
    base_url: str, header: str
) -> None:
    answer = httpx2.get(f"{base_url}/metrics", headers={header: "203.0.113.9"}, timeout=30)

    assert answer.status_code == 403


def test_without_a_database_the_scrape_says_so_and_still_tells_of_requests(
    settings: Settings,
) -> None:
    away = {"database_url": SecretStr("postgresql+psycopg://127.0.0.1:1/none")}
    with serve(settings.model_copy(update=away)) as url:
        httpx2.get(f"{url}/healthz", timeout=30)

        samples = _scrape(url)

    assert _value(samples, "nibble_database_up") == 0
    name = "nibble_http_request_seconds_count"
    assert _value(samples, name, method="GET", route="/healthz", status="200") == 1
    assert _value(samples, "nibble_jobs", status="queued") is None
