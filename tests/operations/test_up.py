"""`nibble up`, in processes of its own: it starts, keeps and stops everything, and leaves nothing behind."""

import json
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from openai import OpenAI

from tests.operations.conftest import Launcher, of_each

Launch = Callable[..., Launcher]


def _models(launcher: Launcher, key_file: Path) -> list[str]:
    key = key_file.read_text().strip()
    with OpenAI(base_url=f"{launcher.url()}/v1", api_key=key, max_retries=0) as client:
        return [model.id for model in client.models.list()]


def test_it_serves_with_the_key_it_names_and_stops_everything_when_told(
    launch: Launch, tmp_path: Path
) -> None:
    launcher = launch()
    url = launcher.url()
    key_file = Path(launcher.wait_for(r"first API key in +(.+)$")[1])
    family = launcher.family()

    models = _models(launcher, key_file)

    assert "tiny-llama" in models
    assert key_file.stat().st_mode & 0o777 == 0o600
    assert launcher.wait_for(r"documentation +(\S+)$")[1] == f"{url}/docs"
    names = of_each(family, psutil.Process.name)
    assert {"postgres", "valkey-server"} <= set(names)
    assert launcher.end(signal.SIGTERM) == 0
    assert launcher.lines[-2:] == ["Stopping …", "Stopped."]
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []
    pg_log = (tmp_path / "data" / "logs" / "postgres.log").read_text()
    assert pg_log.rstrip().endswith("database system is shut down"), "cleanly, by itself"


def test_where_it_is_can_be_read_by_a_script(launch: Launch) -> None:
    launcher = launch("--json")
    url = launcher.url()
    launcher.wait_for(r"Ctrl-C stops it")

    launcher.end()

    told = json.loads(launcher.printed())
    assert told["base_url"] == f"{url}/v1"
    assert Path(told["first_api_key_file"]).read_text().startswith("sk-nibble-")


def test_a_second_one_on_the_same_folder_refuses_and_names_the_first(launch: Launch) -> None:
    first = launch()
    url = first.url()

    second = launch()

    told = second.wait_for("already runs")
    assert f"(process {first.process.pid}, {url})" in told.string
    assert second.process.wait(90) == 1
    assert first.get("/readyz")["status"] == "ready"


def test_nothing_outlives_it_when_it_is_killed_and_a_new_one_takes_over(launch: Launch) -> None:
    killed = launch()
    killed.url()
    family = killed.family()

    killed.process.kill()

    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []
    again = launch()
    assert again.get("/readyz")["status"] == "ready"
    assert again.end(signal.SIGINT) == 0


def test_what_crashes_is_started_again_and_it_says_so(launch: Launch, tmp_path: Path) -> None:
    launcher = launch()
    launcher.url()

    for word, name in (
        ("-m api", "The API"),
        ("valkey-server", "Valkey"),
        ("bin/postgres", "PostgreSQL"),
    ):
        launcher.child(word).kill()
        launcher.wait_for(rf"{name} ended \(killed by SIGKILL\); its log is /.+\.log")
        launcher.wait_for(f"{name} runs again")

    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            if launcher.get("/readyz")["status"] == "ready":
                break
        except OSError:
            time.sleep(0.2)
    assert "tiny-llama" in _models(launcher, tmp_path / "data" / "first-api-key")
    assert launcher.end() == 0


def test_a_taken_port_is_said_before_anything_starts(launch: Launch, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        launcher = launch("--port", str(port))

        assert launcher.process.wait(90) == 1
    told = launcher.wait_for("Error: ").string
    assert f"cannot listen on 127.0.0.1 port {port}" in told
    assert "--port" in told
    assert not (tmp_path / "data" / "postgres").exists()


def test_it_can_be_stopped_while_it_starts(launch: Launch, tmp_path: Path) -> None:
    launcher = launch()
    while not (tmp_path / "data" / "postgres").exists():
        time.sleep(0.01)

    status = launcher.end(signal.SIGINT)

    assert status == 0
    assert launcher.lines[-1:] == ["Stopped."]
    assert "Traceback" not in "\n".join(launcher.lines)
    again = launch()  # whatever was half made is mended
    assert again.get("/readyz")["status"] == "ready"


def test_given_servers_are_used_and_their_passwords_stay_out_of_sight(
    launch: Launch, tmp_path: Path, database_url: str, redis_url: str
) -> None:
    with_password = database_url.replace("nibble@", "nibble:swordfish@")
    launcher = launch(NIBBLE_DATABASE_URL=with_password, NIBBLE_REDIS_URL=redis_url)
    launcher.url()

    family = launcher.family()
    commands = [" ".join(words) for words in of_each(family, psutil.Process.cmdline)]

    assert not any("postgres" in name for name in of_each(family, psutil.Process.name))
    assert not (tmp_path / "data" / "postgres").exists()
    assert not any("swordfish" in command for command in commands)
    key = (tmp_path / "data" / "first-api-key").read_text().strip()
    logs = "".join(log.read_text() for log in (tmp_path / "data" / "logs").iterdir())
    assert "swordfish" not in logs
    assert key not in logs + "".join(launcher.lines)
    assert launcher.end() == 0


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"NIBBLE_LEASE_S": "soon"}, "NIBBLE_LEASE_S: "),
        ({"NIBBLE_DATABASE_URL": "postgresql://127.0.0.1:1/nibble"}, "does not answer"),
        ({"NIBBLE_MODELS_FILE": "/no/such/models.toml"}, "/no/such/models.toml"),
    ],
    ids=["a setting", "a database", "a catalog"],
)
def test_what_is_wrong_is_said_in_words(launch: Launch, env: dict[str, str], expected: str) -> None:
    launcher = launch(**env)

    assert launcher.process.wait(90) == 1

    launcher.wait_for("Error: ")
    told = "\n".join(launcher.lines)
    assert expected in told
    assert "Traceback" not in told


def test_a_folder_that_cannot_be_made_is_said_in_words(launch: Launch) -> None:
    launcher = launch("--data-dir", "/dev/null/nibble")

    assert launcher.process.wait(90) == 1
    launcher.wait_for("Error: Not a directory: /dev/null/nibble")
