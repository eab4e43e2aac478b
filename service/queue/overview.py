"""The queue and the workers as a project may see them: its own jobs one by one, of others' only how many there are."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sqlalchemy.orm import Session

from service.queue import line_repository, workers_repository
from service.queue.expectation import Place, places
from service.tables import Job, Worker

MAX_JOBS = 1_000
_MOST_WORKERS = 1_000
_MOST_HELD = 10_000


@dataclass(frozen=True)
class QueueView:
    """The queue; `own` and `others` count live jobs by status."""

    jobs: Sequence[Job]
    has_more: bool
    places: dict[str, Place]
    own: dict[str, int]
    others: dict[str, int]


@dataclass
class WorkerView:
    """A worker. `is_lost`: it has been silent for longer than a lease."""

    row: Worker
    is_lost: bool
    training: int = 0
    validating: int = 0
    own_jobs: list[str] = field(default_factory=list[str])


def look_at_queue(session: Session, project_id: str, *, limit: int, lease_s: float) -> QueueView:
    """Return the project's first `limit` live jobs (1,000 at most) with their places, and counts of all."""
    limit = min(limit, MAX_JOBS)
    counts = line_repository.count_by_status(session, project_id)
    found = line_repository.live_jobs(session, project_id, limit + 1)
    jobs = found[:limit]
    return QueueView(
        jobs=jobs,
        has_more=len(found) > limit,
        places=places(session, jobs, lease_s=lease_s),
        own=counts[True],
        others=counts[False],
    )


def look_at_workers(session: Session, project_id: str, *, lease_s: float) -> list[WorkerView]:
    """Return the workers that are there, or were within a day and have not said goodbye, oldest first."""
    found = workers_repository.workers(session, within_s=lease_s, limit=_MOST_WORKERS)
    views = {row.id: WorkerView(row, is_lost=not is_heard) for row, is_heard in found}
    for held in workers_repository.held_jobs(session, _MOST_HELD):
        view = views.get(held.worker_id)
        if view is None:
            continue
        if held.is_training:
            view.training += 1
        else:
            view.validating += 1
        if held.project_id == project_id:
            view.own_jobs.append(held.job_id)
    return list(views.values())
