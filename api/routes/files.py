"""Files: training data that comes in, results that go out."""

import base64
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, Any, Literal
from urllib.parse import quote

from anyio.to_thread import run_sync
from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from sqlalchemy.exc import SQLAlchemyError

from api.deps import CallerDep, SessionDep, State, StateDep, StorageDep
from api.errors import errors
from api.upload import UploadForm
from service import clock
from service.db import transaction
from service.errors import InvalidRequest, NotFound, StorageFull, TooLarge
from service.files import actions
from service.files.upload import UPLOAD_PURPOSES, UploadedFile
from service.storage import BlobMissing
from service.tables import File

router = APIRouter(prefix="/files", tags=["Files"])

_UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(UPLOAD_PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": actions.MIN_EXPIRES_S,
                            "maximum": actions.MAX_EXPIRES_S,
                        },
                    },
                }
            }
        },
    }
}


class FileOut(BaseModel):
    """A file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None

    @classmethod
    def of(cls, file: File) -> "FileOut":
        """Show a file."""
        return cls(
            id=file.id,
            bytes=file.bytes,
            created_at=clock.unix(file.created_at),
            expires_at=None if file.expires_at is None else clock.unix(file.expires_at),
            filename=file.filename,
            purpose=file.purpose,
        )


class FileList(BaseModel):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileOut]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    """A file that is no more."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


@router.post(
    "", responses=errors(InvalidRequest, TooLarge, StorageFull), openapi_extra=_UPLOAD_BODY
)
async def upload_file(request: Request, caller: CallerDep, state: StateDep) -> FileOut:
    """Upload a file; `fine-tune` takes JSON Lines."""
    # The raw request: an UploadFile would be spooled to the temporary folder before any of this runs.
    form = UploadForm(state, caller.project_id)
    try:
        uploaded, expires_after_s = await form.read(request)
    finally:
        if form.upload is not None:
            await form.upload.abort()
    return await run_sync(_register, state, caller.project_id, uploaded, expires_after_s)


def _register(
    state: State, project_id: str, uploaded: UploadedFile, expires_after_s: int | None
) -> FileOut:
    try:
        with transaction(state.sessions) as session:
            file = actions.register_uploaded(
                session, state.settings, project_id, uploaded, expires_after_s=expires_after_s
            )
            return FileOut.of(file)
    except BaseException:
        # A commit whose answer was lost may have been made: only what is surely in no row goes.
        with suppress(SQLAlchemyError), transaction(state.sessions) as session:
            if not actions.is_registered(session, project_id, uploaded.file_id):
                state.storage.delete(uploaded.blob_key)
        raise


@router.get("", responses=errors(InvalidRequest))
def list_files(
    caller: CallerDep,
    session: SessionDep,
    after: str | None = None,
    limit: Annotated[int, Query(ge=0, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> FileList:
    """List your files, newest first unless asked otherwise."""
    page = actions.list_files(
        session, caller.project_id, after=after, limit=limit, order=order, purpose=purpose
    )
    return FileList(
        data=[FileOut.of(file) for file in page.files],
        first_id=page.files[0].id if page.files else None,
        last_id=page.files[-1].id if page.files else None,
        has_more=page.has_more,
    )


@router.get("/{file_id}", responses=errors(NotFound))
def get_file(file_id: str, caller: CallerDep, session: SessionDep) -> FileOut:
    """Describe one file."""
    return FileOut.of(actions.get_file(session, caller.project_id, file_id))


@router.delete("/{file_id}", responses=errors(NotFound))
def delete_file(file_id: str, caller: CallerDep, session: SessionDep) -> FileDeleted:
    """Delete a file. Jobs that already use it go on; new ones cannot."""
    actions.delete_file(session, caller.project_id, file_id)
    return FileDeleted(id=file_id)


@router.get("/{file_id}/content", responses=errors(NotFound), response_class=StreamingResponse)
def get_file_content(
    file_id: str, caller: CallerDep, session: SessionDep, storage: StorageDep
) -> StreamingResponse:
    """Download a file's bytes; results of jobs come base64-encoded, as from OpenAI."""
    file = actions.get_file(session, caller.project_id, file_id)
    try:
        size = storage.size(file.blob_key)
    except BlobMissing:
        raise NotFound(f"The bytes of file {file_id} are not there any more.", param="id") from None
    content = storage.astream(file.blob_key)
    if file.purpose == actions.RESULTS_PURPOSE:
        content, size = _base64(content), 4 * -(-size // 3)
    return StreamingResponse(
        content,
        media_type="application/octet-stream",
        headers={
            "content-length": str(size),
            "content-disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
            "x-content-type-options": "nosniff",
        },
    )


async def _base64(content: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for piece in content:
        data = rest + piece
        whole = len(data) - len(data) % 3
        rest = data[whole:]
        yield base64.b64encode(data[:whole])
    yield base64.b64encode(rest)
