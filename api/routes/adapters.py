"""Adapter download: one tar, streamed; it can be resumed (`Range`) and need not be fetched twice (`ETag`)."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from api import ranges
from api.deps import CallerDep, SessionDep, StorageDep
from api.errors import errors
from service.adapters import actions as adapters
from service.adapters.archive import Archive
from service.errors import InvalidRequest, NotFound, RangeNotSatisfiable
from service.jobs import actions as jobs

router = APIRouter(prefix="/fine_tuning/jobs/{job_id}/adapter", tags=["Fine-tuning"])

MEDIA_TYPE = "application/x-tar"

_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {MEDIA_TYPE: {}}, "description": "The whole archive."},
    206: {"content": {MEDIA_TYPE: {}}, "description": "The asked part of it."},
    304: {"description": "The client has it already."},
    **errors(InvalidRequest, NotFound, RangeNotSatisfiable),
}

CheckpointQuery = Annotated[
    str | None, Query(description="The id of a checkpoint, for its adapter instead of the job's.")
]


@router.head("", include_in_schema=False)
@router.get("", response_class=StreamingResponse, responses=_RESPONSES)
def download_adapter(
    request: Request,
    job_id: str,
    caller: CallerDep,
    session: SessionDep,
    storage: StorageDep,
    checkpoint: CheckpointQuery = None,
    range_: Annotated[str | None, Header(alias="range")] = None,
    if_range: Annotated[str | None, Header()] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """Download a succeeded job's adapter, in PEFT format with tokenizer and manifest, as a tar.

    With `?checkpoint=ftckpt_…` it is the adapter kept from that step, whatever became of the job.
    """
    job = jobs.get(session, caller.project_id, job_id)
    if checkpoint is None:
        folder, adapter = job.id, adapters.of_job(session, job)
    else:
        adapter = adapters.of_checkpoint(session, job, checkpoint)
        folder = f"{job.id}-step-{adapter.step_number}"
    archive = Archive.of(adapter, folder)
    headers = {
        "etag": archive.etag,
        "accept-ranges": "bytes",
        "cache-control": "private, no-cache",  # may be kept, must be asked about
    }
    if ranges.not_modified(archive.etag, if_none_match):
        return Response(status_code=304, headers=headers)
    archive.check(storage)
    disposition = {"content-disposition": f'attachment; filename="{folder}.tar"'}
    if request.method == "HEAD":  # for which ranges have no meaning
        length = {"content-length": str(archive.size)}
        return Response(headers=headers | disposition | length, media_type=MEDIA_TYPE)
    wanted = ranges.wanted(archive.size, archive.etag, range_, if_range)
    if wanted == "unsatisfiable":
        raise RangeNotSatisfiable(
            f"The adapter's archive has {archive.size} bytes; the asked range is beyond them.",
            size=archive.size,
        )
    start, end = (0, archive.size) if wanted == "all" else (wanted.start, wanted.end)
    part = {} if wanted == "all" else {"content-range": wanted.content_range}
    return StreamingResponse(
        archive.read(storage, start, end),
        status_code=206 if part else 200,
        headers=headers | disposition | part | {"content-length": str(end - start)},
        media_type=MEDIA_TYPE,
    )
