"""Files of a project: reading, listing, deleting, and entering those whose bytes are stored."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from sqlalchemy.orm import Session

from service import clock
from service.errors import InvalidRequest, NotFound
from service.files import repository
from service.files.upload import UploadedFile, check_quota
from service.ids import new_id
from service.settings import Settings
from service.tables import File

MIN_EXPIRES_S = 3_600
MAX_EXPIRES_S = 2_592_000
RESULTS_PURPOSE = "fine-tune-results"


@dataclass(frozen=True)
class FilePage:
    """Some files in order, and whether there are more behind them."""

    files: Sequence[File]
    has_more: bool


def get_file(session: Session, project_id: str, file_id: str) -> File:
    """Return the project's file.

    Raises:
        NotFound: it has none such, or it is deleted or expired.
    """
    file = repository.get(session, project_id, file_id)
    if file is None:
        raise NotFound(f"No such File object: {file_id}", param="id")
    return file


def list_files(
    session: Session,
    project_id: str,
    *,
    after: str | None = None,
    limit: int = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> FilePage:
    """Return a page of the project's files, by time of creation.

    Args:
        session: to read with.
        project_id: whose.
        after: the last file of the page before; an id that never was gives an empty page.
        limit: at most so many; 0 gives an empty page.
        order: newest first, or oldest first.
        purpose: only these.
    """
    if limit == 0:
        return FilePage((), has_more=False)
    found = repository.page(
        session, project_id, after=after, limit=limit + 1, order=order, purpose=purpose
    )
    return FilePage(found[:limit], has_more=len(found) > limit)


def delete_file(session: Session, project_id: str, file_id: str) -> None:
    """Hide the file at once. Its bytes go later (`purge`), when no live job needs them.

    Raises:
        NotFound: the project has no such file.
    """
    if not repository.hide(session, project_id, file_id, clock.now()):
        raise NotFound(f"No such File object: {file_id}", param="id")


def check_expires_after(anchor: str | None, seconds: str | None) -> int | None:
    """Return after how many seconds a file is to go, from the two form fields; None: never.

    Raises:
        InvalidRequest: one is missing, the anchor unknown, or the time out of bounds.
    """
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequest(
            "expires_after needs the anchor 'created_at'.",
            param="expires_after.anchor",
            code="invalid_value",
        )
    is_number = seconds is not None and seconds.isascii() and seconds.isdigit() and len(seconds) < 9
    if not is_number or not MIN_EXPIRES_S <= int(seconds or "") <= MAX_EXPIRES_S:
        raise InvalidRequest(
            f"expires_after needs seconds, a whole number from {MIN_EXPIRES_S} to {MAX_EXPIRES_S}.",
            param="expires_after.seconds",
            code="invalid_value",
        )
    return int(seconds or "")


def stored_bytes(session: Session, project_id: str) -> int:
    """Return how many bytes the project's files have together, as the quota counts them."""
    return repository.stored_bytes(session, project_id)


def register_uploaded(
    session: Session,
    settings: Settings,
    project_id: str,
    uploaded: UploadedFile,
    *,
    expires_after_s: int | None,
) -> File:
    """Enter a file whose blob is stored.

    Raises:
        QuotaExceeded: other uploads, at the same time, have taken the room that there was when this one began.
    """
    repository.lock_storing(session, project_id)
    check_quota(settings, repository.stored_bytes(session, project_id), uploaded.bytes)
    now = clock.now()
    file = File(
        id=uploaded.file_id,
        project_id=project_id,
        filename=uploaded.filename,
        purpose=uploaded.purpose,
        bytes=uploaded.bytes,
        sha256=uploaded.sha256,
        blob_key=uploaded.blob_key,
        created_at=now,
        expires_at=None if expires_after_s is None else now + timedelta(seconds=expires_after_s),
    )
    repository.insert(session, file)
    return file


def is_registered(session: Session, project_id: str, file_id: str) -> bool:
    """Say whether a file has been entered, whatever became of it afterwards."""
    return repository.has_row(session, project_id, file_id)


def register_produced(
    session: Session,
    project_id: str,
    filename: str,
    purpose: str,
    blob_key: str,
    bytes: int,  # noqa: A002  (the column's and the API's name)
    sha256: str,
) -> File:
    """Enter a file that a job made, whose blob is stored under a key of its own."""
    file = File(
        id=new_id("file-"),
        project_id=project_id,
        filename=filename,
        purpose=purpose,
        bytes=bytes,
        sha256=sha256,
        blob_key=blob_key,
        created_at=clock.now(),
    )
    repository.insert(session, file)
    return file
