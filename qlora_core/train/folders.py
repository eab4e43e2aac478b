"""Folders that are either whole or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STEP = re.compile(r"step-(\d+)")


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write in; on success it becomes ``folder``, flushed to the disk.

    A folder that was there before is replaced. After a crash at any moment ``folder`` is the old
    one, the new one, or absent; never a part of one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    yield unfinished
    for path in [*unfinished.rglob("*"), unfinished]:
        _flush(path)
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)
    _flush(folder.parent)


def step_folder(parent: Path, step: int) -> Path:
    """Name the folder of one step."""
    return parent / f"step-{step}"


def step_folders(parent: Path) -> list[tuple[int, Path]]:
    """Return the finished folders of steps with their numbers, newest first."""
    if not parent.is_dir():
        return []
    found = [(_STEP.fullmatch(path.name), path) for path in parent.iterdir() if path.is_dir()]
    return sorted(((int(m[1]), path) for m, path in found if m), reverse=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
