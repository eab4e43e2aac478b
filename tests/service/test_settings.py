"""Settings that would hurt are refused by name, before anything starts."""

import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from service.settings import Settings, SettingsInvalid, read_settings


def make(**values: object) -> Settings:
    return Settings(_env_file=None, **values)  # type: ignore[call-arg, arg-type]


@pytest.mark.parametrize(("lease_s", "renew_s"), [(10.0, 15.0), (10.0, 10.0), (10.0, 4.0)])
def test_a_lease_that_would_end_before_its_renewals_is_refused(
    lease_s: float, renew_s: float
) -> None:
    with pytest.raises(ValidationError) as caught:
        make(lease_s=lease_s, renew_s=renew_s)

    problem = caught.value.errors()[0]
    assert problem["loc"] == ("renew_s",)
    assert "a third of lease_s" in problem["msg"]


def test_a_lease_that_outlives_two_lost_renewals_is_taken() -> None:
    assert make(lease_s=9.0, renew_s=3.0).renew_s == 3.0
    assert make().renew_s * 3 <= make().lease_s


def test_a_shorter_lease_needs_a_shorter_renewal_than_the_default() -> None:
    with pytest.raises(ValidationError, match="a third of lease_s"):
        make(lease_s=10.0)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"port": "ten", "lease_s": -1}, ("NIBBLE_PORT: ", "NIBBLE_LEASE_S: ")),
        ({"database_url": "postgresql//me:hunter2@x/y"}, ("NIBBLE_DATABASE_URL: ",)),
        ({"database_url": "postgresql://me:hunter2@x:port/y"}, ("NIBBLE_DATABASE_URL: ",)),
        ({"database_url": "sqlite:///hunter2.db"}, ("NIBBLE_DATABASE_URL: ",)),
        ({"redis_url": "amqp://me:hunter2@x"}, ("NIBBLE_REDIS_URL: ",)),
    ],
)
def test_what_cannot_be_is_named_by_its_variable_and_never_quoted(
    given: dict[str, object], told: tuple[str, ...]
) -> None:
    with pytest.raises(SettingsInvalid) as caught:
        read_settings(**given)

    assert all(part in str(caught.value) for part in told)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "url", ["redis://x:6379/0", "rediss://:secret@x", "redis+socket:///run/valkey.sock"]
)
def test_addresses_that_celery_and_the_readiness_check_understand_are_taken(url: str) -> None:
    settings = read_settings(redis_url=url, database_url="postgres://me@x/y")

    assert settings.redis_url == SecretStr(url)
    assert settings.database_url == SecretStr("postgresql+psycopg://me@x/y")


@pytest.mark.parametrize(
    "module", ["api", "worker", "operations.migrate", "operations.health worker", "operations keys"]
)
def test_a_process_with_a_wrong_setting_ends_with_one_sentence(module: str, tmp_path: Path) -> None:
    arguments = [*module.split(), *(["create", "x"] if module.endswith("keys") else [])]

    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        env={"HOME": str(tmp_path), "PYTHONPATH": str(Path.cwd()), "NIBBLE_PORT": "ten"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )

    said = (done.stdout + done.stderr).strip()
    assert done.returncode in (1, 2)
    assert "NIBBLE_PORT: " in said
    assert "\n" not in said
    assert "unforeseen" not in said
