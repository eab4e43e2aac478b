"""The files of resume points: written whole, hashed on the way, and read only if they are what was written.

A point is a folder ``step-N`` of safetensors files, ``state.json``, and ``manifest.json`` with the sha256 sum of each.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from qlora_core.errors import ResumePointError
from qlora_core.models.writing import file_parts
from qlora_core.train.folders import step_folder, step_folders
from qlora_core.train.resume.beside import begin
from qlora_core.train.weights import Weights
from qlora_core.whole_folder import discard, remove_leftovers, written_whole

_KEPT = 2
_MANIFEST = "manifest.json"
_STATE = "state.json"
_TORN = ".torn"
# A manifest or state of ours is some kilobytes.
_MOST_JSON_BYTES = 4 * 2**20
# So much goes to the disk by one call, of at most so many parts.
_TOGETHER_BYTES = 8 * 2**20
_MOST_PARTS = 128


def write_point(
    folder: Path, step: int, tensors: Mapping[str, Weights], state: Mapping[str, Any]
) -> Path:
    """Write a point under ``folder``; it is there, on the disk, when this returns, and nothing is if it fails.

    From a GPU all of it comes to the host's memory first; hashing goes on in threads while the files are written, or
    before it where no thread can be started.

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
    contents = {_file_of(name): _parts(values) for name, values in tensors.items()}
    contents[_STATE] = [_as_json(state)]
    with written_whole(target) as unfinished:
        sums = {file: begin(partial(_sum, parts), name=file) for file, parts in contents.items()}
        try:
            for file, parts in contents.items():
                _write(unfinished / file, parts)
        finally:
            wait(sums.values())  # they read what the caller may change afterwards
        manifest = {file: each.result() for file, each in sums.items()}
        _write(unfinished / _MANIFEST, [_as_json(manifest)])
    return target


def discard_old_points(folder: Path, step: int) -> Future[None]:
    """Leave of the points up to a step the last two, and of torn ones the newest; those of later steps stay.

    Returns:
        What frees their room meanwhile: with large files it takes a third of the time of writing them.
    """
    until_now = [point for number, point in step_folders(folder) if number <= step]
    for old in until_now[_KEPT:] + torn_points(folder)[1:]:
        discard(old)
    return begin(partial(remove_leftovers, folder), name="resume-points")


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
        sums = _json(point / _MANIFEST)
        for file in (_STATE, *files.values()):
            _check_sum(point / file, sums.get(file))
        state = _json(point / _STATE)
        tensors = {name: safetensors.torch.load_file(point / file) for name, file in files.items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise torn(point, error) from error
    return state, tensors


def _check_sum(path: Path, expected: object) -> None:
    if _sha256(path) != expected:
        raise ValueError(f"{path.name} has changed")


def torn(point: Path, error: Exception) -> ResumePointError:
    """Make the error of a point that is not what was written, from what was found in it."""
    reason = str(error)
    if isinstance(error, OSError):
        reason = f"{Path(error.filename or point).name}: {error.strerror or error}"
    return ResumePointError(f"The resume point {point.name} is torn: {reason}.")


def _opened(path: Path) -> io.FileIO:
    """Open what has to be a plain file; of a pipe one would wait for a writer."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    file = io.FileIO(os.open(path, flags))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{path.name} is no plain file")
    return file


def _json(path: Path) -> dict[str, Any]:
    with _opened(path) as file:
        if os.fstat(file.fileno()).st_size > _MOST_JSON_BYTES:
            raise ValueError(f"{path.name} is larger than any of ours")
        text = file.read()
    try:
        values: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON that can be read") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} is not a table")  # noqa: TRY004 - the file's, not the caller's
    return values


def _parts(tensors: Weights) -> list[memoryview]:
    header, parts = file_parts(tensors)
    return [memoryview(header), *parts]


def _sum(parts: Iterable[memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _write(path: Path, parts: Iterable[memoryview]) -> None:
    with path.open("wb", buffering=0) as file:
        for together in _groups(parts):
            _write_all(file.fileno(), together)
            # What is on its way to the disk already need not be waited for at the end; not every system can be told.
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _groups(parts: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    """Put parts together for one call each: adapters are many small tensors."""
    group: list[memoryview] = []
    nbytes = 0
    for part in parts:
        group.append(part)
        nbytes += part.nbytes
        if len(group) == _MOST_PARTS or nbytes >= _TOGETHER_BYTES:
            yield group
            group, nbytes = [], 0
    if group:
        yield group


def _write_all(descriptor: int, parts: list[memoryview]) -> None:
    while parts:
        done = os.writev(descriptor, parts)
        while parts and done >= parts[0].nbytes:
            done -= parts[0].nbytes
            parts = parts[1:]
        if done:
            parts = [parts[0][done:], *parts[1:]]


def _file_of(name: str) -> str:
    return f"{name}.safetensors"


def _as_json(value: Mapping[str, Any]) -> memoryview:
    return memoryview(json.dumps(value, indent=1).encode("utf-8"))


def _sha256(path: Path) -> str:
    with io.BufferedReader(_opened(path)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
