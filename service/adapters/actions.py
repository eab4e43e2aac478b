"""Publishing adapters and checkpoints, and finding what to download.

An adapter's row alone shows nothing to anyone: a checkpoint's row, or the job's success, does. So a worker publishes
first, without holding the job's row while files are copied (it takes the fence before that transaction's commit), and
tells afterwards, in another fenced transaction.
"""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from service import clock
from service.adapters import manifest, names, repository
from service.adapters.manifest import AdapterIncomplete
from service.errors import InvalidRequest, NotFound
from service.events.content import storable
from service.ids import new_id
from service.storage import Storage
from service.tables import Adapter, Checkpoint, Job

__all__ = [
    "AdapterIncomplete",
    "list_checkpoints",
    "of_checkpoint",
    "of_job",
    "publish",
    "save_checkpoint",
]

MAX_PAGE = 100

METRICS = (
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
)
"""What a checkpoint's `metrics` may say, beside `step`."""


def publish(
    session: Session, storage: Storage, job: Job, attempt_no: int, step: int, folder: Path
) -> Adapter:
    """Store a PEFT folder's files and a manifest of them, and return the adapter.

    Take the fence after it, in the same transaction: it takes as long as the files take to copy. What an attempt has published at a
    step stays as it is: a second call returns the first one's adapter and copies nothing.

    Raises:
        AdapterIncomplete: the folder lacks what PEFT needs.
        StorageFull, Unavailable: from the storage.
    """
    published = repository.of_attempt(session, job.id, attempt_no, step)
    if published is not None:
        return published
    files = _store(storage, job, attempt_no, step, folder)
    repository.insert_once(
        session,
        {
            "id": new_id("adapter_"),
            "project_id": job.project_id,
            "job_id": job.id,
            "attempt_no": attempt_no,
            "step_number": step,
            "files": files,
            "bytes": sum(file["bytes"] for file in files),
            "created_at": clock.now(),
        },
    )
    adapter = repository.of_attempt(session, job.id, attempt_no, step)
    if adapter is None:
        raise RuntimeError(f"the adapter of {job.id}, step {step}, vanished")
    return adapter


def save_checkpoint(
    session: Session, job: Job, adapter: Adapter, *, organization: str, metrics: dict[str, Any]
) -> Checkpoint:
    """List an adapter as the job's checkpoint of its step, and return it with its name.

    A step that was listed before (by an attempt that got lost) keeps its id and name, and gets this adapter and these
    metrics. Of `metrics`, OpenAI's six count; absent and non-finite ones are left out.
    """
    content = storable({name: metrics.get(name) for name in METRICS}) or {}
    told = {name: value for name, value in content.items() if value is not None}
    return repository.save_checkpoint(
        session,
        {
            "id": new_id("ftckpt_"),
            "project_id": job.project_id,
            "job_id": job.id,
            "attempt_no": adapter.attempt_no,
            "step_number": adapter.step_number,
            "name": names.checkpoint_name(job, organization, adapter.step_number),
            "metrics": {"step": adapter.step_number, **told},
            "adapter_id": adapter.id,
            "created_at": clock.now(),
        },
    )


def list_checkpoints(
    session: Session, project_id: str, job_id: str, *, after: str | None, limit: int
) -> tuple[list[Checkpoint], bool]:
    """Return up to `limit` checkpoints of a job (100 at most), latest step first, and whether there are more."""
    limit = min(limit, MAX_PAGE)
    found = repository.page_of_checkpoints(
        session, project_id, job_id, after=after, limit=limit + 1
    )
    return list(found[:limit]), len(found) > limit


def of_job(session: Session, job: Job) -> Adapter:
    """Return what a succeeded job made.

    Raises:
        InvalidRequest: it has not succeeded.
        NotFound: its adapter is not there any more.
    """
    if job.status != "succeeded":
        ended = job.finished_at is not None
        advice = (
            "Its checkpoints, if it has any, can be downloaded with ?checkpoint=ftckpt_…"
            if ended
            else "Its adapter can be downloaded once it has succeeded, a checkpoint's at once with ?checkpoint=ftckpt_…"
        )
        raise InvalidRequest(
            f"Job {job.id} is {job.status}, so it has no adapter. {advice}",
            param="fine_tuning_job_id",
            code="adapter_not_ready",
        )
    adapter = repository.newest(session, job.project_id, job.id, step_number=job.adapter_step)
    if adapter is None:
        raise NotFound(f"The adapter of job {job.id} is not there any more.")
    return adapter


def of_checkpoint(session: Session, job: Job, checkpoint_id: str) -> Adapter:
    """Return the adapter kept as a checkpoint.

    Raises:
        NotFound: the job has no such checkpoint.
    """
    checkpoint = repository.get_checkpoint(session, job.project_id, job.id, checkpoint_id)
    adapter = checkpoint and repository.get(session, job.project_id, checkpoint.adapter_id)
    if adapter is None:
        raise NotFound(f"Job {job.id} has no checkpoint {checkpoint_id[:100]}.", param="checkpoint")
    return adapter


def _store(
    storage: Storage, job: Job, attempt_no: int, step: int, folder: Path
) -> list[dict[str, Any]]:
    """Copy the files and their manifest into the storage and return them as `Adapter.files`."""
    entries = manifest.entries(folder)
    prefix = f"adapters/{job.id}/{attempt_no}/step-{step}"
    for entry in entries:
        storage.put_file(f"{prefix}/{entry.name}", folder / entry.name)
    content = manifest.render(job, attempt_no, step, entries)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / manifest.NAME
        path.write_bytes(content)
        storage.put_file(f"{prefix}/{manifest.NAME}", path)
    own = manifest.Entry(manifest.NAME, len(content), hashlib.sha256(content).hexdigest())
    return [
        {
            "name": entry.name,
            "bytes": entry.bytes,
            "sha256": entry.sha256,
            "blob_key": f"{prefix}/{entry.name}",
        }
        for entry in sorted([*entries, own], key=lambda entry: entry.name)
    ]
