"""The body of `POST /v1/files`: a form whose file goes straight to the storage.

The fields may come before or after the file. What is known early is checked early: a wrong purpose that comes first
costs no upload.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from anyio.to_thread import run_sync
from fastapi import Request

from api.deps import State
from api.multipart import PartData, PartEnd, PartStart, read_parts
from service.db import transaction
from service.errors import InvalidRequest, TooLarge
from service.files.actions import check_expires_after, stored_bytes
from service.files.upload import Upload, UploadedFile, check_purpose, check_quota, check_room

_MAX_FIELD_BYTES = 1_000
_FORM_OVERHEAD_BYTES = 100_000
"""What a form may have beside the file: boundaries, headers, fields."""
_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")


class UploadForm:
    """One upload's form while it is read; `upload` must be aborted by whoever holds it, whatever happens."""

    def __init__(self, state: State, project_id: str) -> None:
        self._state = state
        self._project_id = project_id
        self._fields: dict[str, str] = {}
        self._name: str | None = None
        self._value = bytearray()
        self._stored_bytes = 0
        self.upload: Upload | None = None

    async def read(self, request: Request) -> tuple[UploadedFile, int | None]:
        """Read the form to its end; return the stored file and after how many seconds it is to expire.

        Raises:
            InvalidRequest: the form or the file is not what it should be.
            TooLarge: the file, or the form around it, is too large, by declaration or really.
            QuotaExceeded: the project would store too much, by declaration or really.
            StorageFull: there is no room.
        """
        settings = self._state.settings
        declared = _declared_bytes(request)
        if declared is not None:
            declared = max(0, declared - _FORM_OVERHEAD_BYTES)
        check_room(settings, self._state.storage, declared)
        self._stored_bytes = await run_sync(self._count_stored)
        check_quota(settings, self._stored_bytes, declared or 0)
        body = _bounded(request, settings.max_upload_bytes + _FORM_OVERHEAD_BYTES)
        content_type = request.headers.get("content-type", "")
        async with aclosing(body), aclosing(read_parts(content_type, body)) as pieces:
            async for piece in pieces:
                match piece:
                    case PartStart(name, filename):
                        self._start(name, filename)
                    case PartData(data):
                        await self._add(data)
                    case PartEnd():
                        self._end()
        return await self._finish()

    def _count_stored(self) -> int:
        with transaction(self._state.sessions) as session:  # short: an upload may take hours
            return stored_bytes(session, self._project_id)

    def _start(self, name: str, filename: str | None) -> None:
        if name == "file":
            if self.upload is not None:
                raise InvalidRequest("There is more than one 'file'.", param="file")
            if filename is None:
                raise InvalidRequest(
                    "The part 'file' has no file name (with curl: -F file=@training.jsonl).",
                    param="file",
                )
            self.upload = Upload(
                self._state.settings,
                self._state.storage,
                project_id=self._project_id,
                filename=filename,
                stored_bytes=self._stored_bytes,
            )
            return
        if name not in _FIELDS:
            shown = name[:_MAX_FIELD_BYTES]
            raise InvalidRequest(
                f"Unknown parameter: {shown!r}.", param=shown, code="unknown_parameter"
            )
        if name in self._fields:
            raise InvalidRequest(f"There is more than one {name!r}.", param=name)
        self._name = name
        self._value.clear()

    async def _add(self, data: bytes) -> None:
        if self._name is not None:
            self._value += data
            if len(self._value) > _MAX_FIELD_BYTES:
                raise InvalidRequest(f"{self._name!r} is too long.", param=self._name)
        elif self.upload is not None:
            await self.upload.write(data, purpose=self._fields.get("purpose"))

    def _end(self) -> None:
        if self._name is None:
            return
        value = self._value.decode("utf-8", "replace")
        self._fields[self._name] = check_purpose(value) if self._name == "purpose" else value
        self._name = None

    async def _finish(self) -> tuple[UploadedFile, int | None]:
        if self.upload is None:
            raise _missing("file")
        if "purpose" not in self._fields:
            raise _missing("purpose")
        expires_after_s = check_expires_after(
            self._fields.get("expires_after[anchor]"), self._fields.get("expires_after[seconds]")
        )
        return await self.upload.finish(self._fields["purpose"]), expires_after_s


def _declared_bytes(request: Request) -> int | None:
    declared = request.headers.get("content-length", "")
    return int(declared) if declared.isdigit() else None


async def _bounded(request: Request, limit: int) -> AsyncGenerator[bytes]:
    """Give the body's pieces; raise when they are too many."""
    total = 0
    async with aclosing(request.stream()) as stream:
        async for data in stream:
            total += len(data)
            if total > limit:
                raise TooLarge(f"A form with a file may have {limit} bytes.", param="file")
            yield data


def _missing(name: str) -> InvalidRequest:
    return InvalidRequest(
        f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter"
    )
