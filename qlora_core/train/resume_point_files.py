"""The files of resume points: written whole, hashed on the way, and read only if they are what was written.

A point is a folder ``step-N`` of safetensors files, ``state.json``, and ``manifest.json`` with the sha256 sum of each.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

import safetensors.torch
from safetensors import SafetensorError

from qlora_core.errors import ResumePointError
from qlora_core.models.writing import file_parts
from qlora_core.train.folders import step_folder, step_folders
from qlora_core.train.weights import Weights
from qlora_core.whole_folder import discard, remove_leftovers, written_whole

_KEPT = 2
_MANIFEST = "manifest.json"
_STATE = "state.json"
_TORN = ".torn"
# Parts that may wait to be hashed: on a GPU each of them is a copy in the host's memory.
_WAITING = 16


def write_point(
    folder: Path, step: int, tensors: Mapping[str, Weights], state: Mapping[str, Any]
) -> Path:
    """Write a point under ``folder``; it is there, on the disk, when this returns, and nothing is if it fails.

    Args:
        folder: that of all points of a run.
        step: which one it is.
        tensors: by the name of their file, without its suffix.
        state: everything else, as JSON values.

    Returns:
        The new point's folder.

    Raises:
        OSError: the disk is full, or refuses to be written to.
    """
    target = step_folder(folder, step)
    with written_whole(target) as unfinished, ExitStack() as running:
        sums: dict[str, Sum] = {}
        for name, values in tensors.items():
            file = _file_of(name)
            sums[file] = running.enter_context(Sum())
            header, parts = file_parts(values)
            _write(unfinished / file, header, parts, sums[file])
        sums[_STATE] = running.enter_context(Sum())
        _write(unfinished / _STATE, _as_json(state), (), sums[_STATE])
        manifest = {file: each.hexdigest() for file, each in sums.items()}
        (unfinished / _MANIFEST).write_bytes(_as_json(manifest))
    return target


def discard_old_points(folder: Path, step: int) -> threading.Thread:
    """Leave of the points up to a step the last two, and of torn ones the newest; those of later steps stay.

    Returns:
        What frees their room meanwhile: with large files it takes a third of the time of writing them.
    """
    until_now = [point for number, point in step_folders(folder) if number <= step]
    for old in until_now[_KEPT:] + torn_points(folder)[1:]:
        discard(old)
    freeing = threading.Thread(target=remove_leftovers, args=(folder,), name="resume-points")
    freeing.start()
    return freeing


def points_of(folder: Path) -> list[Path]:
    """Find the points in a folder, the newest first; one point's own folder is that one."""
    if (folder / _MANIFEST).is_file():
        return [folder]
    return [point for _, point in step_folders(folder)]


def torn_points(folder: Path) -> list[Path]:
    """Find what `set_aside` has left, the newest first."""
    return [path for _, path in step_folders(folder, suffix=_TORN)]


def set_aside(point: Path) -> None:
    """Rename a point that is not whole, so that it counts as none of the last two and is not tried again."""
    aside = point.with_name(point.name + _TORN)
    if aside.exists():
        shutil.rmtree(aside)
    point.rename(aside)


def read_point(point: Path, names: Iterable[str]) -> tuple[dict[str, Any], dict[str, Weights]]:
    """Give the state and the tensors of each file, if the files are those that were written.

    Raises:
        ResumePointError: they are not: one is missing, cut or changed.
    """
    files = {name: _file_of(name) for name in names}
    try:
        sums = json.loads((point / _MANIFEST).read_text(encoding="utf-8"))
        for file in (_STATE, *files.values()):
            if _sha256(point / file) != sums[file]:
                raise ResumePointError(
                    f"The resume point {point.name} is torn: {file} has changed."
                )
        state = dict(json.loads((point / _STATE).read_text(encoding="utf-8")))
        tensors = {name: safetensors.torch.load_file(point / file) for name, file in files.items()}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ResumePointError(f"The resume point {point.name} is torn: {reason}.") from error
    return state, tensors


class Sum:
    """The sha256 of a file, computed in a thread of its own while the file is being written."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._parts: SimpleQueue[bytes | memoryview | None] = SimpleQueue()
        self._room = threading.BoundedSemaphore(_WAITING)
        self._thread = threading.Thread(target=self._run, name="sha256", daemon=True)

    def __enter__(self) -> Self:
        """Start; the thread ends with the block."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for what was added."""
        self._parts.put(None)
        self._thread.join()

    def add(self, part: bytes | memoryview) -> None:
        """Take the file's next bytes, which must stay as they are; waits where too many wait already."""
        self._room.acquire()
        self._parts.put(part)

    def hexdigest(self) -> str:
        """Wait for what was added, which was all, and give the sum."""
        self._parts.put(None)
        self._thread.join()
        return self._digest.hexdigest()

    def _run(self) -> None:
        while (part := self._parts.get()) is not None:
            self._digest.update(part)
            self._room.release()


def _write(path: Path, header: bytes, parts: Iterable[memoryview], digest: Sum) -> None:
    with path.open("wb") as file:
        digest.add(header)
        file.write(header)
        for part in parts:
            digest.add(part)
            file.write(part)


def _file_of(name: str) -> str:
    return f"{name}.safetensors"


def _as_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode("utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
