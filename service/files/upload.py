"""A file on its way in: written once, to its blob, while it is counted, hashed and looked at.

Nothing is visible before `finish`, and after `abort` nothing is left. What the lines hold is checked by the jobs that
use the file; here only the first line has to look like JSONL, so that a wrong file is refused at once.
"""

import asyncio
import codecs
import hashlib
import re
from dataclasses import dataclass

from qlora_core.text.jsonl import EXPECTED, LineUnreadable, check_start, read_object
from service.errors import InvalidRequest, QuotaExceeded, StorageFull, TooLarge
from service.ids import new_id
from service.settings import Settings
from service.storage import BlobWriter, Storage

UPLOAD_PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")

_WRITE_BYTES = 1 << 20
_CHECK_DISK_EVERY_BYTES = 16 << 20
_MAX_FIRST_LINE_BYTES = 1 << 20
_MAX_FILENAME_LENGTH = 255


@dataclass(frozen=True)
class UploadedFile:
    """What is known of a stored blob, before it has a row."""

    file_id: str
    filename: str
    purpose: str
    blob_key: str
    bytes: int
    sha256: str


def check_room(settings: Settings, storage: Storage, declared_bytes: int | None) -> None:
    """Refuse an upload that cannot end well, before any of it is read.

    Args:
        settings: limits.
        storage: where it would go.
        declared_bytes: the request's length, as its header says; None: it does not say.

    Raises:
        TooLarge: it is over `max_upload_bytes`.
        StorageFull: it would leave less than `min_free_bytes` of the disk.
    """
    if declared_bytes is not None and declared_bytes > settings.max_upload_bytes:
        raise _too_large(settings)
    free = storage.free_bytes()
    if free is not None and free - (declared_bytes or 0) < settings.min_free_bytes:
        raise StorageFull(
            f"There is no room for this file: {free} bytes of the server's disk are free, and"
            f" {settings.min_free_bytes} of them are kept back. Delete files, or ask the operator for more room."
        )


def check_quota(settings: Settings, stored_bytes: int, added_bytes: int) -> None:
    """Refuse what would give a project more bytes than it may store.

    Args:
        settings: limits.
        stored_bytes: what its files have together.
        added_bytes: what comes, or has come so far; 0: not known yet.

    Raises:
        QuotaExceeded: it is more than `max_stored_bytes`, or, of a file not known, there is no room for a byte.
    """
    limit = settings.max_stored_bytes
    if stored_bytes + max(1, added_bytes) > limit:
        raise QuotaExceeded(
            f"This project's files have {stored_bytes} bytes together and may have {limit}; this file does not fit."
            " Delete files that are not needed any more, and send it again.",
            param="file",
        )


def check_purpose(purpose: str) -> str:
    """Return `purpose`, or raise InvalidRequest naming the ones there are."""
    if purpose not in UPLOAD_PURPOSES:
        allowed = ", ".join(repr(known) for known in UPLOAD_PURPOSES)
        raise InvalidRequest(
            f"{purpose!r} is not one of [{allowed}] - 'purpose'",
            param="purpose",
            code="invalid_value",
        )
    return purpose


def base_name(filename: str) -> str:
    """Return a file's name without the folders some clients send before it, be they POSIX's or Windows'.

    Raises:
        InvalidRequest: nothing is left, or what is left is too long or not printable.
    """
    name = re.split(r"[/\\]", filename)[-1].strip()
    if name in {"", ".", ".."}:
        raise InvalidRequest(
            f"{filename!r} is not a file's name.", param="file", code="invalid_filename"
        )
    if len(name) > _MAX_FILENAME_LENGTH or not name.isprintable():
        raise InvalidRequest(
            f"A file's name has at most {_MAX_FILENAME_LENGTH} characters, all of them printable.",
            param="file",
            code="invalid_filename",
        )
    return name


class Upload:
    """One upload, used from one task: `write`, …, then `finish` or `abort`."""

    def __init__(
        self,
        settings: Settings,
        storage: Storage,
        *,
        project_id: str,
        filename: str,
        stored_bytes: int,
    ) -> None:
        """Open it.

        Args:
            settings: limits.
            storage: where the bytes go.
            project_id: whose file it will be.
            filename: as sent; only its base name is kept.
            stored_bytes: what the project's files have together, without this one.
        """
        self._settings = settings
        self._storage = storage
        self._stored_bytes = stored_bytes
        self._filename = base_name(filename)
        self._file_id = new_id("file-")
        self._key = f"files/{project_id}/{self._file_id}"
        self._writer: BlobWriter = storage.writer(self._key)
        self._pending = bytearray()
        self._sha256 = hashlib.sha256()
        self._bytes = 0
        self._checked_disk_at = 0
        self._first_line: FirstLine | None = FirstLine()

    async def write(self, data: bytes, *, purpose: str | None) -> None:
        """Add `data`.

        Args:
            data: the next bytes.
            purpose: if it is known already: what is no JSONL is then refused early.

        Raises:
            TooLarge: the file grows over `max_upload_bytes`.
            QuotaExceeded: the project's files grow over `max_stored_bytes`.
            InvalidRequest: it is for fine-tuning and no JSONL.
            StorageFull: the disk is full.
        """
        self._bytes += len(data)
        if self._bytes > self._settings.max_upload_bytes:
            raise _too_large(self._settings)
        check_quota(self._settings, self._stored_bytes, self._bytes)
        self._sha256.update(data)
        if self._first_line is not None:
            self._first_line.add(data)
            self._check_format(purpose, at_end=False)
        self._pending += data
        if len(self._pending) >= _WRITE_BYTES:
            await self._flush()

    async def finish(self, purpose: str) -> UploadedFile:
        """Store the file for good and return what is known of it.

        Raises:
            InvalidRequest: it is empty, or for fine-tuning and no JSONL.
            StorageFull: the disk is full.
        """
        if self._bytes == 0:
            raise InvalidRequest(
                f"The file {self._filename!r} is empty.", param="file", code="empty_file"
            )
        self._check_format(purpose, at_end=True)
        await self._flush()
        await self._writer.close()
        return UploadedFile(
            file_id=self._file_id,
            filename=self._filename,
            purpose=purpose,
            blob_key=self._key,
            bytes=self._bytes,
            sha256=self._sha256.hexdigest(),
        )

    async def abort(self) -> None:
        """Leave nothing behind; harmless after `finish`."""
        await self._writer.abort()

    async def _flush(self) -> None:
        if self._bytes - self._checked_disk_at >= _CHECK_DISK_EVERY_BYTES:
            self._checked_disk_at = self._bytes
            await asyncio.to_thread(check_room, self._settings, self._storage, None)
        data, self._pending = bytes(self._pending), bytearray()
        if data:
            await self._writer.write(data)

    def _check_format(self, purpose: str | None, *, at_end: bool) -> None:
        if self._first_line is None or purpose is None:
            return
        if purpose != "fine-tune":
            self._first_line = None
        elif at_end or self._first_line.is_whole:
            self._first_line.check()
            self._first_line = None


class FirstLine:
    """The first line of a file that is not blank, or its first megabyte if it is longer."""

    def __init__(self) -> None:
        self._number = 1
        self._start: bytes | None = b""
        self._line: bytearray = bytearray()
        self.is_whole = False

    def add(self, data: bytes) -> None:
        """Look at the next bytes of the file."""
        if self.is_whole:
            return
        if self._start is not None:  # a byte order mark may come in pieces
            self._start += data
            if codecs.BOM_UTF8.startswith(self._start) and self._start != codecs.BOM_UTF8:
                return
            data, self._start = self._start.removeprefix(codecs.BOM_UTF8), None
        if not self._line:  # blank lines go at once, however many: this is the event loop's time
            rest = data.lstrip()
            self._number += data.count(b"\n", 0, len(data) - len(rest))
            data = rest
        line, newline, _ = data.partition(b"\n")
        self._line += line[: _MAX_FIRST_LINE_BYTES - len(self._line)]
        self.is_whole = bool(newline) or len(self._line) == _MAX_FIRST_LINE_BYTES

    def check(self) -> None:
        """Raise InvalidRequest unless the line is a JSON object, or may be one where it is cut off."""
        if not self._line.strip():
            raise InvalidRequest(
                "The file is empty: it has blank lines only.", param="file", code="empty_file"
            )
        try:
            if len(self._line) == _MAX_FIRST_LINE_BYTES:
                check_start(bytes(self._line))  # the rest is for the job to judge
            else:
                read_object(bytes(self._line))
        except LineUnreadable as error:
            raise self._invalid(error.reason) from error
        except RecursionError as error:
            raise self._invalid("is nested too deeply.") from error

    def _invalid(self, reason: str) -> InvalidRequest:
        message = f"{EXPECTED} Line {self._number} {reason}"
        return InvalidRequest(message, param="file", code="invalid_jsonl")


def _too_large(settings: Settings) -> TooLarge:
    return TooLarge(f"A file may have {settings.max_upload_bytes} bytes.", param="file")
