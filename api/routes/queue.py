"""The queue and the workers. Of other projects' jobs both tell how many there are, and nothing else."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict

from api.deps import CallerDep, SessionDep, SettingsDep
from api.errors import errors
from service import clock
from service.errors import InvalidRequest
from service.queue import overview
from service.queue.expectation import Place
from service.tables import Job

router = APIRouter(prefix="/fine_tuning", tags=["Fine-tuning"])


class Counts(BaseModel):
    """How many jobs are in each status that is not an end."""

    validating_files: int = 0
    queued: int = 0
    running: int = 0
    paused: int = 0


class QueuedJobOut(BaseModel):
    """One of your jobs, as the queue sees it."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    status: Literal["validating_files", "queued", "running", "paused"]
    model: str
    priority: int
    """Higher goes first within a project."""
    created_at: int
    queue_position: int | None
    """Among the jobs of all projects that wait for training: 1 is next."""
    expected_start: int | None
    estimated_finish: int | None
    memory_needed_bytes: int | None
    waits_because: str | None

    @classmethod
    def of(cls, job: Job, place: Place) -> "QueuedJobOut":
        """Show a job."""
        start = place.expected_start
        runs = job.status == "running"
        return cls.model_validate(
            {
                "id": job.id,
                "status": job.status,
                "model": job.model,
                "priority": job.priority,
                "created_at": clock.unix(job.created_at),
                "queue_position": place.position,
                "expected_start": clock.unix(start) if start else None,
                "estimated_finish": (
                    clock.unix(job.estimated_finish) if runs and job.estimated_finish else None
                ),
                "memory_needed_bytes": job.memory_needed_bytes,
                "waits_because": place.waits_because,
            }
        )


class QueueOut(BaseModel):
    """The queue: your jobs that have not ended, those that run first, and how many there are."""

    object: Literal["fine_tuning.queue"] = "fine_tuning.queue"
    data: list[QueuedJobOut]
    has_more: bool
    own: Counts
    others: Counts


class DeviceOut(BaseModel):
    """What a training slot trains on; all but the name are null for a CPU."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    name: str
    memory_bytes: int | None = None
    free_memory_bytes: int | None = None
    """When the worker was last heard of."""
    driver: str | None = None


class WorkerOut(BaseModel):
    """A worker: one process on one machine."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    object: Literal["fine_tuning.worker"] = "fine_tuning.worker"
    host: str
    status: Literal["online", "lost"]
    """`lost`: it has been silent for longer than a lease; it is listed for a day, or until a worker of its host starts."""
    started_at: int
    seen_at: int
    train_slots: int
    validate_slots: int
    devices: list[DeviceOut]
    """One per training slot."""
    problem: str | None
    """Why it takes no training although it has a GPU."""
    training: int
    """How many jobs, of all projects, it trains now."""
    validating: int
    jobs: list[str]
    """Those of them that are yours."""

    @classmethod
    def of(cls, view: overview.WorkerView) -> "WorkerOut":
        """Show a worker."""
        slots: dict[str, Any] = view.row.slots
        return cls.model_validate(
            {
                "id": view.row.id,
                "host": view.row.host,
                "status": "lost" if view.is_lost else "online",
                "started_at": clock.unix(view.row.started_at),
                "seen_at": clock.unix(view.row.seen_at),
                "train_slots": slots["train"],
                "validate_slots": slots["validate"],
                "devices": slots["devices"],
                "problem": slots.get("problem"),
                "training": view.training,
                "validating": view.validating,
                "jobs": view.own_jobs,
            }
        )


class WorkerList(BaseModel):
    """All workers at once: this list has no pages."""

    object: Literal["list"] = "list"
    data: list[WorkerOut]


@router.get("/queue", responses=errors(InvalidRequest))
def get_queue(
    caller: CallerDep,
    session: SessionDep,
    settings: SettingsDep,
    limit: Annotated[int, Query(ge=1)] = 100,
) -> QueueOut:
    """Show your jobs that run or wait, in the order of their turn, and how many other projects have."""
    view = overview.look_at_queue(session, caller.project_id, limit=limit, lease_s=settings.lease_s)
    return QueueOut(
        data=[QueuedJobOut.of(job, view.places.get(job.id, Place())) for job in view.jobs],
        has_more=view.has_more,
        own=Counts(**view.own),
        others=Counts(**view.others),
    )


@router.get("/workers", responses=errors())
def list_workers(caller: CallerDep, session: SessionDep, settings: SettingsDep) -> WorkerList:
    """List the workers, with their GPUs and what they are at."""
    views = overview.look_at_workers(session, caller.project_id, lease_s=settings.lease_s)
    return WorkerList(data=[WorkerOut.of(view) for view in views])
