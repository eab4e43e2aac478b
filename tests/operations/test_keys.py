"""`nibble keys`, beside a running service."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from openai import AuthenticationError, OpenAI

from tests.operations.conftest import Launcher


def _keys(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "operations", "keys", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_new_key_opens_the_service_until_it_is_revoked(
    launch: Callable[..., Launcher], tmp_path: Path
) -> None:
    launcher = launch()
    url = launcher.url()
    folder = ("--data-dir", str(tmp_path / "data"))

    made = _keys("create", "search team", *folder, "--json")

    assert made.returncode == 0, made.stderr
    key = json.loads(made.stdout)
    with OpenAI(base_url=f"{url}/v1", api_key=key["secret"], max_retries=0) as client:
        assert client.models.list().data
        assert _keys("revoke", key["id"], *folder).returncode == 0
        with pytest.raises(AuthenticationError):
            client.models.list()


def test_without_a_service_it_says_what_to_do(tmp_path: Path) -> None:
    ended = _keys("create", "me", "--data-dir", str(tmp_path))

    assert ended.returncode == 2
    assert f"no service runs over {tmp_path}" in ended.stderr
    assert "nibble up" in ended.stderr


def test_an_empty_name_is_refused(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIBBLE_DATABASE_URL", database_url)

    ended = _keys("create", " ")

    assert ended.returncode == 2
    assert "name" in ended.stderr
