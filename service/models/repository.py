"""SQL of fine-tuned models: they are the names on succeeded jobs."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.tables import Checkpoint, Job

MAX_LISTED = 10_000
"""Newest first; `GET /v1/models` has no pages."""


def fine_tuned(session: Session, project_id: str) -> Sequence[Job]:
    """Return the project's succeeded jobs that made a model, newest first, `MAX_LISTED` at most."""
    statement = (
        select(Job)
        .where(
            Job.project_id == project_id,
            Job.status == "succeeded",
            Job.fine_tuned_model.is_not(None),
        )
        .order_by(Job.created_at.desc(), Job.id.desc())
        .limit(MAX_LISTED)
    )
    return session.scalars(statement).all()


def find_fine_tuned(session: Session, project_id: str, name: str) -> Job | None:
    """Return the project's succeeded job that made the model `name`, or None."""
    statement = select(Job).where(
        Job.project_id == project_id, Job.status == "succeeded", Job.fine_tuned_model == name
    )
    return session.scalars(statement).one_or_none()


def find_checkpoint(session: Session, project_id: str, name: str) -> Checkpoint | None:
    """Return the project's checkpoint `name` (`ft:…:ckpt-step-N`), or None."""
    statement = select(Checkpoint).where(
        Checkpoint.project_id == project_id, Checkpoint.name == name
    )
    return session.scalars(statement).one_or_none()
