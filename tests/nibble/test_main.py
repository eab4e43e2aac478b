"""The program as a process: what it says of itself, and that no way of being cut short shows a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nibble", *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        env=os.environ | {"NIBBLE_API_KEY": "sk-nibble-test"},
    )


def test_help_lists_the_commands_without_loading_the_sdk() -> None:
    code = "import sys; from nibble.main import app; print('openai' in sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )

    shown = run("--help")

    assert shown.returncode == 0
    for command in ("files", "jobs", "models", "up", "demo", "keys"):
        assert command in shown.stdout
    assert loaded.stdout == "False\n", loaded.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["jobs", "create", "--help"]], ids=" ".join)
def test_a_full_disk_under_stdout_is_one_sentence(arguments: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        result = run(*arguments, stdout=full.fileno())

    assert result.returncode == 1
    assert result.stderr == "Error: cannot write the output: No space left on device\n"


def test_a_reader_that_leaves_early_is_no_error_worth_a_word() -> None:
    reader, writer = os.pipe()
    os.close(reader)

    result = run("models", "list", "--base-url", "ftp://x", "--json", stdout=writer)
    os.close(writer)

    assert result.returncode in (1, 2)
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr
