"""A job's row over a file that has no bytes, for tests that only count and look."""

from typing import Any

from sqlalchemy.orm import Session

from service import clock
from service.ids import new_id
from service.tables import DEFAULT_PROJECT, File, Job


def add_job(session: Session, **columns: Any) -> str:
    """Add a queued job, its columns as given, and return its id."""
    job_id, file_id = new_id("ftjob-"), new_id("file-")
    file = {"purpose": "fine-tune", "bytes": 1, "sha256": "0" * 64, "blob_key": file_id}
    about: dict[str, Any] = {"project_id": DEFAULT_PROJECT, "created_at": clock.now()}
    session.add(File(id=file_id, filename="train.jsonl", **about, **file))
    session.flush()
    asked = {"model": "tiny", "training_file": file_id, "seed": 0, "spec": {}}
    row = {"status": "queued", "hyperparameters": {}} | about | asked | columns
    session.add(Job(id=job_id, **row))
    session.flush()
    return job_id
