"""The program as a process: what it says of itself, and that no way of being cut short shows a traceback."""

import json
import os
import re
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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["jobs", "create", "train.jsonl", "--json"], "'--model'"),
        (
            ["jobs", "create", "t.jsonl", "--model", "m", "--epochs", "x", "--json"],
            "'x' is neither",
        ),
        (["jobs", "get", "", "--json"], "an id cannot be empty."),
        (["jobs", "dance", "--json"], "No such command 'dance'"),
        (["up", "--port", "many", "--json"], "unable to parse string as an integer"),
        (["demo", "--epochs", "0", "--json"], "greater than or equal to 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_a_sentence_and_with_json_also_a_document(
    arguments: list[str], said: str
) -> None:
    result = run(*arguments)

    assert result.returncode == 2
    assert said in re.sub(r"[\s│]+", " ", result.stderr)
    document = json.loads(result.stdout)
    assert document["error"]["exit_code"] == 2
    assert said in document["error"]["message"]


def test_it_says_its_version() -> None:
    result = run("--version")

    assert re.fullmatch(r"nibble \d+\.\d+\.\d+\n", result.stdout)
