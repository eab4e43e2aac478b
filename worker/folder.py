"""The attempt's folder: how the worker's parent and its child speak (docs/contracts.md has the table).

Everything that a reader may meet half-written is written beside its place and renamed.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

LOG_TAIL_BYTES = 4_000


@dataclass(frozen=True)
class AttemptFolder:
    """The places of one attempt. The child uses this class too, so it imports nothing heavy."""

    path: Path

    @property
    def spec(self) -> Path:
        """What to do; written by the parent before the start."""
        return self.path / "spec.json"

    @property
    def inputs(self) -> Path:
        """The job's files, fetched from storage."""
        return self.path / "inputs"

    @property
    def events(self) -> Path:
        """What the child tells, line by line."""
        return self.path / "events.jsonl"

    @property
    def log(self) -> Path:
        """The child's stdout and stderr."""
        return self.path / "log.txt"

    @property
    def run(self) -> Path:
        """The engine's output: checkpoints, resume points, the adapter."""
        return self.path / "run"

    @property
    def lease(self) -> Path:
        """Until when the attempt may go on; written by the parent at each renewal."""
        return self.path / "lease.json"

    @property
    def result(self) -> Path:
        """How it ended; written by the child, last."""
        return self.path / "result.json"

    def create(self) -> None:
        """Make the folder, for this user alone: the inputs are the team's data."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.inputs.mkdir(exist_ok=True)
        self.run.mkdir(exist_ok=True)

    def read_spec(self) -> dict[str, Any]:
        """Return spec.json's object."""
        return cast("dict[str, Any]", json.loads(self.spec.read_text(encoding="utf-8")))

    def read_result(self) -> dict[str, Any] | None:
        """Return result.json's object; None: the child did not get to write it."""
        return _read_object(self.result)

    def read_deadline(self) -> float | None:
        """Return until when (seconds of CLOCK_BOOTTIME) the lease is ours; None: not said."""
        lease = _read_object(self.lease) or {}
        until = lease.get("until_boottime")
        return float(until) if isinstance(until, int | float) else None

    def write_deadline(self, until_boottime: float) -> None:
        """Say until when the lease is ours."""
        write_json(self.lease, {"until_boottime": until_boottime}, durable=False)

    def log_tail(self) -> str:
        """Return the end of the child's log, cut at a line, or else at a word; empty if there is none."""
        try:
            with self.log.open("rb") as log:
                log.seek(0, os.SEEK_END)
                start = max(0, log.tell() - LOG_TAIL_BYTES)
                log.seek(start)
                tail = log.read()
        except OSError:
            return ""
        if start:  # half a folder's name would not be recognised as one
            tail = tail.partition(b"\n")[2] or tail.partition(b" ")[2]
        text = tail.decode("utf-8", "replace").strip()
        return text.replace("\0", "\N{REPLACEMENT CHARACTER}")  # which PostgreSQL cannot store

    def drop_heavy_parts(self) -> None:
        """Remove inputs and the engine's output; what tells the story (spec, events, log, result) stays."""
        shutil.rmtree(self.inputs, ignore_errors=True)
        shutil.rmtree(self.run, ignore_errors=True)


def write_json(path: Path, value: dict[str, Any], *, durable: bool = True) -> None:
    """Put a JSON object at `path`, whole or not at all; durable: it survives a power cut."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(value, file)  # ASCII: what quotes a user's file may hold halves of characters
        file.flush()
        if durable:
            os.fsync(file.fileno())
    partial.replace(path)


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None
