"""Folders that are either whole or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write in; it becomes ``folder`` on success and is removed on any failure.

    What ``folder`` was before is there until the new one is in its place: beside it, if the machine stops in between.
    """
    target = real(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        for path in [*unfinished.rglob("*"), unfinished]:
            _flush(path)
        _put_in_place(unfinished, target)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        # A full disk does not say what could not be written to it.
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(folder)
        raise


def real(folder: Path) -> Path:
    """Follow links, so that what a link leads to is replaced and not the link."""
    return Path(os.path.realpath(folder))


def aside_of(target: Path) -> Path:
    """Where the folder that was there before waits until the new one is in its place."""
    return target.with_name(f".{target.name}.replaced")


def _put_in_place(unfinished: Path, target: Path) -> None:
    aside = aside_of(target)
    try:
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
            target.rename(aside)
        unfinished.rename(target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise
    _flush(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
