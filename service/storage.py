"""Blobs: one thin layer over obstore, for a local folder (the default), S3, GCS and Azure.

A blob is visible only once it is whole: written under another name, synced to disk and renamed in a local folder (by
our own writer, since obstore's does not sync); a multipart upload elsewhere. Blobs are never changed after that.
"""

import asyncio
import errno
import fcntl
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from service.errors import StorageFull, Unavailable
from service.settings import Settings

_CHUNK_BYTES = 1 << 20
_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PARTIAL = ".partial"


class BlobMissing(Exception):
    """There is no blob under this key."""


class StorageUrlInvalid(ValueError):
    """NIBBLE_STORAGE_URL cannot be used."""


class _Aborted(Exception):
    """Never leaves this module."""


class BlobWriter(Protocol):
    """A blob being written; nobody sees it before `close` returns."""

    async def write(self, data: bytes) -> None:
        """Add `data` at the end."""
        ...

    async def close(self) -> None:
        """Make the blob visible, durably."""
        ...

    async def abort(self) -> None:
        """Leave nothing behind; harmless after `close`, which it does not undo, and when called twice."""
        ...


class Storage:
    """Where blobs are. Safe to use from several threads.

    Every method raises `StorageFull` when there is no room and `Unavailable` when the storage does not answer.
    """

    def __init__(self, store: ObjectStore, folder: Path | None = None) -> None:
        self._store: ObjectStore = store
        self._folder = folder

    @classmethod
    def open(cls, settings: Settings) -> "Storage":
        """Return the configured storage; a local folder is made if missing.

        Raises:
            StorageUrlInvalid: the URL is malformed, or its kind unknown.
        """
        url = settings.blobs_url
        parts = urlsplit(url)
        if parts.scheme != "file":
            try:
                return cls(from_url(url))
            except (BaseError, ValueError) as error:
                raise StorageUrlInvalid(f"storage URL {url!r} cannot be used: {error}") from error
        folder = Path(unquote(parts.path))
        if parts.netloc or not folder.is_absolute():
            raise StorageUrlInvalid(
                f"storage URL {url!r} names no absolute folder (file:///folder)"
            )
        (folder / _PARTIAL).mkdir(parents=True, exist_ok=True)
        return cls(LocalStore(folder), folder)

    def writer(self, key: str) -> BlobWriter:
        """Return a writer of the blob `key`."""
        _check(key)
        if self._folder is not None:
            return _LocalWriter(self._folder, key)
        return _RemoteWriter(self._store, key)

    def put_file(self, key: str, path: Path) -> None:
        """Store a local file's content under `key`."""
        _check(key)
        if self._folder is None:
            with _translated(key):
                obstore.put(self._store, key, path, max_concurrency=4)
            return
        writer = _LocalWriter(self._folder, key)
        try:
            with path.open("rb") as source:
                while data := source.read(_CHUNK_BYTES):
                    writer.write_now(data)
            writer.close_now()
        finally:
            writer.abort_now()

    def stream(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Return the bytes [start, end) of a blob, piece by piece.

        Raises:
            BlobMissing: at once, not on the first piece.
        """
        if end is not None and end <= start:
            return iter(())
        with _translated(key):
            result = obstore.get(self._store, key, options=_range(start, end))
        return _pieces(key, result)

    async def astream(
        self, key: str, start: int = 0, end: int | None = None
    ) -> AsyncIterator[bytes]:
        """The same for an event loop; `BlobMissing` is raised on the first piece."""
        if end is not None and end <= start:
            return
        with _translated(key):
            result = await obstore.get_async(self._store, key, options=_range(start, end))
            async for piece in result.stream(min_chunk_size=_CHUNK_BYTES):
                yield bytes(piece)

    def fetch(self, key: str, path: Path) -> None:
        """Copy a blob to the local file `path`, which appears whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
        try:
            with _disk_errors(), partial.open("wb") as target:
                for piece in self.stream(key):
                    target.write(piece)
                target.flush()
                os.fsync(target.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def delete(self, key: str) -> None:
        """Remove a blob; one that is not there is as good as removed."""
        try:
            with _translated(key):
                obstore.delete(self._store, key)
        except BlobMissing:
            return

    def size(self, key: str) -> int:
        """Return a blob's size in bytes.

        Raises:
            BlobMissing: there is none.
        """
        with _translated(key):
            return obstore.head(self._store, key)["size"]

    def free_bytes(self) -> int | None:
        """Return how many bytes can still be written, or None where that cannot be known."""
        return None if self._folder is None else shutil.disk_usage(self._folder).free

    def sweep(self, *, older_than_s: float) -> int:
        """Remove what writers left behind whose process died, and return how many pieces that were.

        Args:
            older_than_s: what was written to since is left alone, as is all that a living writer holds.
        """
        if self._folder is None:
            return 0
        limit = time.time() - older_than_s
        swept = 0
        for path in (self._folder / _PARTIAL).iterdir():
            with (
                suppress(OSError),
                path.open("r+b") as file,
            ):  # another process may end it meanwhile
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.stat().st_mtime < limit:
                    path.unlink()
                    swept += 1
        return swept


class _LocalWriter:
    """Writes beside the blobs, then syncs and renames.

    The thread's lock holds off an abort while a thread still writes; the file's says that the writer lives.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._path = folder / key
        self._partial = folder / _PARTIAL / secrets.token_hex(16)
        self._file: BinaryIO | None = None
        self._ended = False
        self._lock = threading.Lock()

    async def write(self, data: bytes) -> None:
        await asyncio.to_thread(self.write_now, data)

    async def close(self) -> None:
        await asyncio.to_thread(self.close_now)

    async def abort(self) -> None:
        # Not in a thread: a cancelled task may not get to await anything, and this is quick.
        self.abort_now()

    def write_now(self, data: bytes) -> None:
        with self._lock, _disk_errors():
            self._open().write(data)

    def close_now(self) -> None:
        with self._lock, _disk_errors():
            file = self._open()
            os.fsync(file.fileno())
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._partial.replace(self._path)
            file.close()  # and unlocks it: not before it has its place
            _sync_folder(self._path.parent)
            self._ended = True

    def abort_now(self) -> None:
        with self._lock:
            self._ended = True
            if self._file is not None:
                self._file.close()
                self._partial.unlink(missing_ok=True)

    def _open(self) -> BinaryIO:
        if self._ended:
            raise ValueError("this blob's writer has been closed")
        if self._file is None:
            self._file = self._partial.open("xb", buffering=0)
            with suppress(OSError):  # a file system without locks: nothing is ever swept there
                fcntl.flock(self._file, fcntl.LOCK_SH)
        return self._file


class _RemoteWriter:
    """A multipart upload. At most some 25 MB of it are in memory."""

    def __init__(self, store: ObjectStore, key: str) -> None:
        self._key = key
        self._file = obstore.open_writer_async(
            store, key, buffer_size=5 * 1024 * 1024, max_concurrency=4
        )
        self._ended = False

    async def write(self, data: bytes) -> None:
        with _translated(self._key):
            await self._file.write(data)

    async def close(self) -> None:
        self._ended = True
        with _translated(self._key):
            await self._file.close()

    async def abort(self) -> None:
        if self._ended:
            return
        self._ended = True
        with _translated(self._key), suppress(_Aborted):
            async with self._file:  # leaving it by an exception is how obstore aborts
                raise _Aborted


def _pieces(key: str, result: "obstore.GetResult") -> Iterator[bytes]:
    with _translated(key):
        for piece in result.stream(min_chunk_size=_CHUNK_BYTES):
            yield bytes(piece)


def _range(start: int, end: int | None) -> "obstore.GetOptions | None":
    if end is not None:
        return {"range": (start, end)}
    return {"range": {"offset": start}} if start else None


def _check(key: str) -> None:
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is not a blob's key")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_errors() -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull("There is no room left on the server's disk.") from error
        raise


@contextmanager
def _translated(key: str) -> Generator[None]:
    """Obstore raises FileNotFoundError for a missing blob, and its own errors for the rest."""
    try:
        yield
    except FileNotFoundError as error:
        raise BlobMissing(key) from error
    except (BaseError, OSError) as error:
        if "No space left" in str(error):
            raise StorageFull("There is no room left in the storage.") from error
        raise Unavailable(f"The file storage does not answer: {type(error).__name__}.") from error
