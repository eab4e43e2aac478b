"""docker-compose.yml, held to the code: every command, port, variable and service in it exists."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from service.settings import Settings
from tests.containers.conftest import ROOT, Dockerfile

OURS = ("migrate", "api", "worker-cpu", "worker-gpu")
_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def _env_example() -> dict[str, str]:
    lines = (ROOT / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def _substituted(value: object, given: dict[str, str]) -> str:
    """What compose makes of `${NAME:-default}` and `${NAME:?message}`."""

    def replace(match: re.Match[str]) -> str:
        name, how, rest = match.groups()
        if given.get(name):
            return given[name]
        assert how != "?", f"{name} is required: {rest}"
        return rest or ""

    return _VARIABLE.sub(replace, str(value))


def test_every_service_of_ours_and_those_it_stands_on_are_there(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {"postgres", "redis", *OURS}


@pytest.mark.parametrize("name", OURS)
def test_its_image_is_built_from_files_that_are_there(compose: dict[str, Any], name: str) -> None:
    build = compose["services"][name]["build"]

    dockerfile = Dockerfile(ROOT / build["context"] / build["dockerfile"])

    assert build.get("target", "image") in dockerfile.stages


@pytest.mark.parametrize("name", OURS)
def test_its_commands_are_modules_that_can_be_run(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    commands = [service["command"]]
    if "healthcheck" in service:
        commands.append(service["healthcheck"]["test"][1:])

    for command in commands:
        assert command[:2] == ["python", "-m"]
        spec = find_spec(command[2])
        assert spec is not None, command
        if spec.submodule_search_locations:
            assert find_spec(f"{command[2]}.__main__"), command


@pytest.mark.parametrize("name", OURS)
def test_its_variables_are_settings_with_values_that_settings_take(
    compose: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    environment = compose["services"][name]["environment"]
    given = _env_example() | {"POSTGRES_PASSWORD": "swordfish"}
    ours = {key for key in environment if key.startswith("NIBBLE_")}
    for key in ours:
        monkeypatch.setenv(key, _substituted(environment[key], given))

    settings = Settings()

    assert {key.removeprefix("NIBBLE_").lower() for key in ours} <= set(Settings.model_fields)
    assert settings.database_url is not None
    assert settings.database_url.get_secret_value() == (
        "postgresql+psycopg://nibble:swordfish@postgres:5432/nibble"
    )
    assert settings.redis_url is not None
    assert settings.redis_url.get_secret_value() == "redis://redis:6379/0"
    assert {key for key in environment if not key.startswith("NIBBLE_")} <= {"HF_TOKEN"}


def test_the_database_is_the_one_that_the_url_names(compose: dict[str, Any]) -> None:
    environment = compose["services"]["postgres"]["environment"]

    assert environment["POSTGRES_USER"] == environment["POSTGRES_DB"] == "nibble"
    assert environment["POSTGRES_PASSWORD"].startswith("${POSTGRES_PASSWORD:?")


def test_every_variable_is_in_the_example_and_the_secret_has_no_default(
    compose: dict[str, Any],
) -> None:
    used = set(_VARIABLE.findall((ROOT / "docker-compose.yml").read_text()))

    names = {name for name, _, _ in used}

    assert names == set(_env_example())
    assert _env_example()["POSTGRES_PASSWORD"] == ""
    with pytest.raises(AssertionError, match="is required"):
        _substituted(compose["services"]["api"]["environment"]["NIBBLE_DATABASE_URL"], {})
    for name, how, default in used:
        if how == "-":
            assert _env_example()[name] == default


def test_the_published_port_is_the_one_that_is_listened_on(compose: dict[str, Any]) -> None:
    api = compose["services"]["api"]
    exposed = [
        instruction.rest
        for instruction in Dockerfile(ROOT / "Dockerfile").lineage("api")
        if instruction.word == "EXPOSE"
    ]

    (port,) = api["ports"]

    inner = _substituted(port, _env_example()).rsplit(":", 1)[1]
    assert inner == str(api["environment"]["NIBBLE_PORT"]) == exposed[0]
    assert api["environment"]["NIBBLE_HOST"] == "0.0.0.0"  # noqa: S104  (inside its container)
    assert not any("ports" in compose["services"][name] for name in ("postgres", "redis"))


def test_migrations_run_once_on_a_healthy_database_and_before_everything_else(
    compose: dict[str, Any],
) -> None:
    services = compose["services"]

    assert services["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert services["migrate"]["restart"] == "no"
    assert services["migrate"]["command"] == ["python", "-m", "operations.migrate"]
    for name in ("api", "worker-cpu", "worker-gpu"):
        assert services[name]["depends_on"] == {
            "migrate": {"condition": "service_completed_successfully"},
            "redis": {"condition": "service_healthy"},
        }


def test_everything_that_stays_has_a_health_check(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert ("healthcheck" in service) == (name != "migrate"), name


def test_every_named_volume_is_declared_and_every_declared_one_used(
    compose: dict[str, Any],
) -> None:
    mounted = {
        volume.split(":", 1)[0]
        for service in compose["services"].values()
        for volume in service["volumes"]
    }

    assert mounted == set(compose["volumes"])


def test_api_and_workers_share_the_data_folder(compose: dict[str, Any]) -> None:
    for name in OURS:
        service = compose["services"][name]
        assert "data:/data" in service["volumes"]
        assert service["environment"]["NIBBLE_DATA_DIR"] == "/data"


def test_a_stopping_worker_gets_the_time_it_asks_for(compose: dict[str, Any]) -> None:
    for name in ("worker-cpu", "worker-gpu"):
        grace = compose["services"][name]["stop_grace_period"]
        assert float(grace.removesuffix("s")) >= Settings().stop_grace_s + 10


def test_only_the_gpu_worker_asks_for_a_gpu_and_only_when_wanted(compose: dict[str, Any]) -> None:
    gpu = compose["services"]["worker-gpu"]

    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]

    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert gpu["profiles"] == ["gpu"]
    assert not any("deploy" in compose["services"][name] for name in OURS if name != "worker-gpu")


def test_the_queue_server_keeps_the_queue(compose: dict[str, Any]) -> None:
    command = " ".join(compose["services"]["redis"]["command"])

    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command
