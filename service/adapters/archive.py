"""An adapter as one tar, whose every byte has its place before anything is read.

So its length is known, any part of it can be sent, and the same adapter always gives the same bytes. Nothing is held
in memory but headers: the files' bytes come from the storage as they are sent.
"""

import tarfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from service import clock
from service.adapters import manifest
from service.errors import NotFound
from service.storage import BlobMissing, Storage
from service.tables import Adapter

LAYOUT = "tar1"
"""Part of the ETag: change it with anything that changes the archive's bytes."""

_END = bytes(2 * tarfile.BLOCKSIZE)


@dataclass(frozen=True)
class Literal:
    """Bytes that are there: a header, padding, the end."""

    content: bytes

    @property
    def size(self) -> int:
        """How many bytes."""
        return len(self.content)


@dataclass(frozen=True)
class Blob:
    """Bytes of the storage."""

    key: str
    size: int


@dataclass(frozen=True)
class Archive:
    """The parts of a tar, in order, and what stands for its content."""

    parts: tuple[Literal | Blob, ...]
    etag: str  # strong, in its quotes

    @property
    def size(self) -> int:
        """The archive's length in bytes."""
        return sum(part.size for part in self.parts)

    @classmethod
    def of(cls, adapter: Adapter, folder: str) -> "Archive":
        """Lay out an adapter's files under one folder."""
        parts: list[Literal | Blob] = []
        etag = ""
        for file in adapter.files:
            header = tarfile.TarInfo(f"{folder}/{file['name']}")
            header.size = file["bytes"]
            header.mtime = clock.unix(adapter.created_at)
            parts.append(Literal(header.tobuf(tarfile.PAX_FORMAT)))
            if file["bytes"]:
                parts.append(Blob(file["blob_key"], file["bytes"]))
            if padding := -file["bytes"] % tarfile.BLOCKSIZE:
                parts.append(Literal(bytes(padding)))
            if file["name"] == manifest.NAME:
                etag = f'"{LAYOUT}-{folder}-{file["sha256"]}"'
        parts.append(Literal(_END))
        return cls(tuple(parts), etag)

    def check(self, storage: Storage) -> None:
        """See that every byte can be sent, before the first one is.

        Raises:
            NotFound: a blob is missing, or not as long as it was.
        """
        for part in self.parts:
            if isinstance(part, Blob):
                try:
                    whole = storage.size(part.key) == part.size
                except BlobMissing:
                    whole = False
                if not whole:
                    raise NotFound("The adapter's files are not there any more.")

    def cut(self, start: int, end: int) -> Iterator[tuple[Literal | Blob, int, int]]:
        """Yield the parts that hold the bytes [start, end), each with the range of its own bytes."""
        position = 0
        for part in self.parts:
            first, last = max(start - position, 0), min(end - position, part.size)
            if first < last:
                yield part, first, last
            position += part.size

    async def read(self, storage: Storage, start: int, end: int) -> AsyncIterator[bytes]:
        """Yield the bytes [start, end), piece by piece."""
        for part, first, last in self.cut(start, end):
            if isinstance(part, Literal):
                yield part.content[first:last]
            else:
                async for piece in storage.astream(part.key, first, last):
                    yield piece
