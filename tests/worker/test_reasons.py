"""A full disk, in the words of every library that may meet it."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from worker.child.failures import explain
from worker.reasons import NoRoom, is_disk_full

# What a child runs whose only writable disk has room for 64 KB.
_MEET_A_FULL_DISK = """
import sys, torch, safetensors.torch
from worker.child.failures import explain

try:
    safetensors.torch.save_file({"a": torch.zeros(100_000)}, sys.argv[1] + "/a.safetensors")
except Exception as error:
    print(type(error).__name__, explain(error)["code"])
"""


def test_the_writer_of_checkpoints_meets_a_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = 'mount -t tmpfs -o size=64k none "$0"'
    try:
        subprocess.run([*inside, mount, str(disk)], check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine lets nobody make a small disk")

    told = subprocess.run(
        [
            *inside,
            f'{mount} && exec "$@"',
            str(disk),
            sys.executable,
            "-c",
            _MEET_A_FULL_DISK,
            disk,
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )

    assert told.stdout.split() == ["SafetensorError", "disk_full"]


def _caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def _met_while_handling(error: Exception, first: Exception) -> Exception:
    error.__context__ = first
    return error


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        Exception("Disk quota exceeded (os error 122)"),  # tokenizers' own type is no narrower
        RuntimeError("[enforce fail at inline_container.cc:668] . No space left on device"),
        _caused(ValueError("it cannot be saved"), FULL),
        _met_while_handling(KeyError("clean-up failed"), FULL),
    ],
    ids=repr,
)
def test_no_room_is_recognised_whoever_says_it(error: Exception) -> None:
    assert is_disk_full(error)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        SafetensorError("Error while deserializing header: header too large"),
        SafetensorError("I/O error: Permission denied (os error 13)"),
        RuntimeError("os error 281"),
    ],
    ids=repr,
)
def test_another_error_is_not_taken_for_a_full_disk(error: Exception) -> None:
    assert not is_disk_full(error)


def test_an_error_that_is_its_own_context_is_looked_at_once() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__context__, second.__context__ = second, first

    assert not is_disk_full(first)


def test_too_little_room_is_a_full_disk_that_says_how_much_was_needed() -> None:
    told = explain(NoRoom("The job needs 5 bytes."))

    assert (told["code"], told["message"]) == ("disk_full", "The job needs 5 bytes.")
