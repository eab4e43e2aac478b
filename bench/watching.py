"""Watches the memory of a process from outside, by what `/proc` says of it every millisecond.

The process says a line when it is ready, reads one, does what is measured, says what came of it as a line of JSON, and
waits for its input's end.
"""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("RssAnon", "RssFile")


class ProcessEnded(Exception):
    """A process has ended before it was measured; the message is a sentence with its last words."""


@dataclass(frozen=True)
class Watched:
    """What a process told, and its memory's peak in bytes above what it held when it was ready.

    Attributes:
        told: its line of JSON.
        above: by kind: anonymous pages (RssAnon), those of mapped files (RssFile), and of both "together".
    """

    told: dict[str, Any]
    above: dict[str, int]


def watch(command: Sequence[str | Path]) -> Watched:
    """Run a process from the repository's folder and watch it.

    Raises:
        ProcessEnded: it has ended before it told what came of it.
    """
    with (
        tempfile.TemporaryFile() as complaints,  # a pipe that nobody reads would fill up
        subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            bufsize=0,
        ) as process,
    ):
        assert process.stdin is not None  # noqa: S101 - pipes, as asked for
        try:
            _line(process, lambda: None)
            before = memory_of(process.pid)
            peak = dict(before)

            def look() -> None:
                for kind, nbytes in memory_of(process.pid).items():
                    peak[kind] = max(peak[kind], nbytes)

            process.stdin.write(b"go\n")
            told = json.loads(_line(process, look))
        except (EOFError, BrokenPipeError):
            code = process.wait()
            complaints.seek(0)
            words = complaints.read().decode(errors="replace").strip().splitlines()
            raise ProcessEnded(
                f"{' '.join(map(str, command[1:]))} ended with {code} before it was measured: "
                f"{words[-1] if words else 'it said nothing'}"
            ) from None
    return Watched(told, {kind: peak[kind] - before[kind] for kind in peak})


def memory_of(pid: int) -> dict[str, int]:
    """Give a process's resident bytes by kind, and together; one that has ended has none."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    sizes = {kind: int(fields.get(kind, "0 kB").split()[0]) * 1024 for kind in KINDS}
    return sizes | {"together": sum(sizes.values())}


def _line(process: subprocess.Popen[bytes], meanwhile: Callable[[], None]) -> bytes:
    """Wait for a whole line of the process, and call something every millisecond until it is there.

    Raises:
        EOFError: the process has ended.
    """
    assert process.stdout is not None  # noqa: S101
    os.set_blocking(process.stdout.fileno(), False)
    line = b""
    while not line.endswith(b"\n"):
        meanwhile()
        piece = process.stdout.read()  # None: nothing is there yet
        if piece == b"":
            raise EOFError
        line += piece or b""
        time.sleep(0.001)
    return line
