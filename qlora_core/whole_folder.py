"""Folders that are either whole or not there: written beside their place, then renamed into it.

What lies beside ``out`` meanwhile is called ``.out.<8 hex digits>.unfinished``, ``.replaced`` or ``.discarded``, by digits of each
run's own: no run takes what another one writes, or a folder of the user's, for its own.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_BESIDE = re.compile(r"\.(.+)\.[0-9a-f]{8}\.(?:unfinished|replaced|discarded)")


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write in; it becomes ``folder`` on success and is removed on any failure.

    What ``folder`` was before is there until the new one is in its place: beside it, if the machine stops in between.

    Raises:
        OSError: the disk is full, refuses to be written to, or ``folder`` was empty or not there at first, and now has files
            in it.
    """
    target = real(folder)
    _make(target.parent)
    replaces = target.is_dir() and any(target.iterdir())
    for left in leftovers(target):
        if left.suffix == ".unfinished":
            _remove_unless_locked(left)
    unfinished = _beside(target, "unfinished")
    try:
        unfinished.mkdir()
        with _locked(unfinished):
            yield unfinished
            for path in [*unfinished.rglob("*"), unfinished]:
                _flush(path)
            _put_in_place(unfinished, target, replaces=replaces)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        # A full disk does not say what could not be written to it, and nobody knows our name for the folder.
        if isinstance(error, OSError) and error.errno is not None and error.filename2 is None:
            error.filename = _named(error.filename, unfinished, folder)
        raise


def real(folder: Path) -> Path:
    """Follow links, so that what a link leads to is replaced and not the link."""
    return Path(os.path.realpath(folder))


def leftovers(target: Path) -> list[Path]:
    """Find what runs that were cut off have left beside ``target``, and what others are writing there."""
    return [path for name, path in _all_beside(target.parent) if name == target.name]


def remove_leftovers(parent: Path) -> None:
    """Remove from a folder of our own all that runs that were cut off have left in it."""
    for _, left in _all_beside(parent):
        if left.suffix == ".discarded":  # nobody writes there
            shutil.rmtree(left, ignore_errors=True)
        else:
            _remove_unless_locked(left)


def discard(folder: Path) -> None:
    """Rename a folder of our own, so that it is gone at once, and whole until then; `remove_leftovers` frees its room."""
    folder.rename(_beside(folder, "discarded"))


def put_back_replaced(parent: Path) -> None:
    """Put those back that were to be replaced in a folder of our own, where the machine stopped before the new one was there."""
    for name, left in _all_beside(parent):
        if left.suffix == ".replaced" and not (parent / name).exists():
            left.rename(parent / name)


def _make(folder: Path) -> None:
    """Make a folder and those above it, and see to it that they outlast a power cut."""
    if folder.is_dir():
        return
    _make(folder.parent)
    folder.mkdir(exist_ok=True)
    _flush(folder.parent)


def _all_beside(parent: Path) -> list[tuple[str, Path]]:
    try:
        found = [(_BESIDE.fullmatch(path.name), path) for path in sorted(parent.iterdir())]
    except OSError:  # it is not there, or cannot be listed
        return []
    return [(match[1], path) for match, path in found if match is not None]


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{kind}")


def _named(name: object, unfinished: Path, folder: Path) -> object:
    return str(folder) if name in (None, str(unfinished)) else name


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock, by which others see that its writer lives; give whether it was to be had.

    The machine drops it when the process ends, however it ends.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another has it, or the file system has no locks: then leftovers stay
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _remove_unless_locked(folder: Path) -> None:
    # Another run may remove it at the same time.
    with suppress(OSError), _locked(folder) as is_ours:
        if is_ours:
            shutil.rmtree(folder)


def _put_in_place(unfinished: Path, target: Path, *, replaces: bool) -> None:
    if not replaces:
        unfinished.rename(target)  # fails where another has put files meanwhile
        _flush(target.parent)
        return
    aside = _beside(target, "replaced")
    try:
        if target.exists():
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
