"""Liveness, readiness, and the headers every answer has."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx2
import pytest
from pydantic import SecretStr

from api.main import create_app
from operations import migrate
from operations.embedded import postgres
from service import db
from service.settings import Settings
from tests.api.conftest import run_process, serve, wait_until
from tests.stopped import stopped


def test_a_running_api_is_ready_and_needs_no_key_to_say_so(base_url: str) -> None:
    answer = httpx2.get(f"{base_url}/readyz")

    assert answer.status_code == 200
    assert answer.json() == {
        "status": "ready",
        "checks": {"database": "ok", "redis": "ok", "first_key": "ok"},
    }
    assert httpx2.get(f"{base_url}/healthz").json() == {"status": "ok"}


def test_without_a_database_it_lives_is_not_ready_and_says_why(settings: Settings) -> None:
    gone = SecretStr("postgresql://nobody@127.0.0.1:1/nothing")

    with serve(settings.model_copy(update={"database_url": gone})) as url:
        ready = httpx2.get(f"{url}/readyz", timeout=60)
        alive = httpx2.get(f"{url}/healthz")
        call = httpx2.get(f"{url}/v1/models", headers={"authorization": "Bearer sk"}, timeout=60)

    assert (ready.status_code, alive.status_code) == (503, 200)
    assert ready.json()["checks"]["database"] == "the database does not answer"
    assert call.status_code == 503
    assert call.headers["retry-after"] == "5"
    assert call.json()["error"]["code"] == "service_unavailable"


def test_while_the_database_hangs_it_says_so_in_time_and_recovers(
    settings: Settings, postgres_server: postgres.Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "_POOL_S", 1.0)
    hasty = settings.model_copy(update={"database_patience_s": 1.0})

    with serve(hasty) as url, ThreadPoolExecutor(45) as many:
        key = settings.first_key_file.read_text().strip()
        ask = partial(httpx2.get, f"{url}/v1/models", headers={"authorization": f"Bearer {key}"})
        ready = partial(httpx2.get, f"{url}/readyz", timeout=60)
        wait_until(lambda: ready().status_code == 200)
        with stopped(postgres_server):
            calls = [many.submit(ask, timeout=60) for _ in range(45)]  # more than there are threads
            hanging = ready()
            refused = [call.result() for call in calls]
        wait_until(lambda: ready().status_code == 200)
        served = ask(timeout=60)

    assert hanging.status_code == 503
    assert hanging.json()["checks"]["database"] == "the database does not answer"
    assert {(call.status_code, call.json()["error"]["code"]) for call in refused} == {
        (503, "service_unavailable")
    }
    assert served.status_code == 200


def test_without_a_broker_it_is_not_ready(settings: Settings) -> None:
    gone = SecretStr("redis://127.0.0.1:1/0")

    with serve(settings.model_copy(update={"redis_url": gone})) as url:
        ready = httpx2.get(f"{url}/readyz", timeout=60)

    assert ready.status_code == 503
    assert "does not answer" in ready.json()["checks"]["redis"]


def test_an_old_schema_is_not_ready_and_the_first_key_follows_the_migrations(
    settings: Settings, empty_database_url: str
) -> None:
    empty = settings.model_copy(update={"database_url": SecretStr(empty_database_url)})

    with serve(empty) as url:
        before = httpx2.get(f"{url}/readyz")
        migrate.upgrade(empty_database_url)
        wait_until(lambda: httpx2.get(f"{url}/readyz").status_code == 200)

    assert before.status_code == 503
    assert "migrate" in before.json()["checks"]["database"]
    assert empty.first_key_file.stat().st_mode & 0o777 == 0o600


def test_a_key_file_that_cannot_be_written_is_made_as_soon_as_it_can(settings: Settings) -> None:
    settings.first_key_file.mkdir(parents=True)  # in the file's place

    with serve(settings) as url:
        before = httpx2.get(f"{url}/readyz")
        settings.first_key_file.rmdir()
        wait_until(lambda: httpx2.get(f"{url}/readyz").status_code == 200)

    assert before.status_code == 503
    assert "not made yet" in before.json()["checks"]["first_key"]


def test_every_answer_has_openai_s_headers(http: httpx2.Client) -> None:
    answers = [http.get("/v1/models"), http.get("/v1/nothing"), http.get("/healthz")]

    for answer in answers:
        assert re.fullmatch(r"req_[A-Za-z0-9]{24}", answer.headers["x-request-id"])
        assert answer.headers["openai-organization"] == "org-nibble"
        assert answer.headers["openai-version"] == "2020-10-01"
        assert answer.headers["openai-processing-ms"].isdigit()


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [("build-1234-retry", True), ("short", False), ("a b c d e f g h", False), ("x" * 65, False)],
)
def test_a_request_id_from_outside_is_kept_only_if_well_formed(
    http: httpx2.Client, given: str, is_kept: bool
) -> None:
    answer = http.get("/v1/models", headers={"x-request-id": given})

    assert (answer.headers["x-request-id"] == given) is is_kept


def test_the_process_logs_json_lines_without_keys_and_ends_on_sigterm(
    settings: Settings, tmp_path: Path
) -> None:
    with run_process(settings, tmp_path / "api.log") as api:
        key = settings.first_key_file.read_text().strip()
        headers = {"authorization": f"Bearer {key}"}
        answer = httpx2.get(f"{api.url}/v1/models/{key}", headers=headers)

    text = api.log.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert key not in text
    request = next(line for line in lines if line.get("path", "").startswith("/v1/models/"))
    assert request["path"] == "/v1/models/[secret]"
    assert request["request_id"] == answer.headers["x-request-id"]
    assert request["status"] == 404


def test_a_wrong_setting_ends_the_start_with_one_line(tmp_path: Path) -> None:
    environment = {"NIBBLE_PORT": "ten", "NIBBLE_DATABASE_URL": "postgresql://me:hunter2@x/y"}

    done = subprocess.run(
        [sys.executable, "-m", "api"],
        env={"HOME": str(tmp_path), "PYTHONPATH": str(Path.cwd()), **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 1
    assert done.stderr.startswith("nibble api: NIBBLE_PORT: ")
    assert done.stderr.count("\n") == 1
    assert "hunter2" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"database_url": None}, "NIBBLE_DATABASE_URL is not set"),
        ({"redis_url": None}, "NIBBLE_REDIS_URL is not set"),
        ({"models_file": Path("/nowhere/models.toml")}, "/nowhere/models.toml: there is no such"),
        ({"storage_url": "ftp://somewhere"}, "storage URL 'ftp://somewhere' cannot be used"),
        ({"storage_url": "file://blobs"}, "names no absolute folder"),
    ],
)
def test_what_is_missing_is_found_when_the_application_is_made(
    settings: Settings, changes: dict[str, object], told: str
) -> None:
    with pytest.raises((ValueError, RuntimeError), match=re.escape(told)):
        create_app(settings.model_copy(update=changes))
