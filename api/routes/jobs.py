"""Fine-tuning jobs: create, list, look at, pause, resume, cancel."""

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request
from pydantic import BaseModel, ConfigDict
from sqlalchemy.orm import Session

from api.deps import CallerDep, CatalogDep, DoorbellDep, SessionDep, SettingsDep
from api.errors import errors
from service import clock
from service.errors import IdempotencyKeyReused, InvalidRequest, NotFound, TooManyJobs
from service.jobs import actions, wishes
from service.jobs.actions import JobFilter
from service.jobs.fingerprint import Fingerprint
from service.jobs.spec import MAX_METADATA_PAIRS, CreateJob
from service.jobs.state import TERMINAL
from service.queue.expectation import Place, places
from service.settings import Settings
from service.tables import Job

router = APIRouter(prefix="/fine_tuning/jobs", tags=["Fine-tuning"])

_METADATA = re.compile(r"metadata\[(.*)\]", re.DOTALL)


class JobErrorOut(BaseModel):
    """Why a job failed."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    code: str
    message: str
    param: str | None = None
    hint: str | None = None
    log_tail: str | None = None
    """The last lines of what its process said, without this service's folders and secrets."""


class JobOut(BaseModel):
    """A fine-tuning job, OpenAI's fields first, ours after them."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    status: Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
    model: str
    training_file: str
    validation_file: str | None
    fine_tuned_model: str | None
    error: JobErrorOut | None
    hyperparameters: dict[str, Any]
    """What was asked; once the files are validated, the numbers in force."""
    method: dict[str, Any]
    organization_id: str
    result_files: list[str]
    seed: int
    trained_tokens: int | None
    estimated_finish: int | None
    integrations: list[Any] = []
    metadata: dict[str, str] | None

    is_terminal: bool
    """Whether the status is final."""
    cancel_requested: bool
    """Whether a worker has been asked to stop for good, and has not yet."""
    pause_requested: bool
    """Whether the job is to be paused, and is not yet."""
    paused_at: int | None
    """Since when the job is paused; its status is `queued` then, as OpenAI's six have no other word for it."""
    user_provided_suffix: str | None
    attempt: int
    """How often a worker has taken the job, to validate or to train."""
    trained_steps: int | None
    total_steps: int | None
    dataset_report: dict[str, Any] | None
    """What validation found in each file; in lists without the single lines."""
    sample_prompts: list[Any]
    queue_position: int | None
    """Its place among the jobs of all projects that wait for training, while it is one of them: 1 is next."""
    expected_start: int | None
    """When it should start; null where that cannot be known, as behind runs that have not said when they are done."""
    memory_needed_bytes: int | None
    """What it needs of a GPU at least, as estimated from its model and hyperparameters; null: not known."""
    waits_because: str | None
    """Where no worker's GPU is large enough: which would be. The job waits for one."""

    @classmethod
    def of(
        cls,
        job: Job,
        settings: Settings,
        newest_step: dict[str, Any] | None = None,
        place: Place | None = None,
        *,
        in_list: bool = False,
    ) -> "JobOut":
        """Show a job. `newest_step`: the data of its newest metrics; `place`: where it stands in the queue."""
        step = newest_step or {}
        place = place or Place()
        report = _short(job.dataset_report) if in_list else job.dataset_report
        kind = job.spec["method"]["type"]
        ended = job.status in TERMINAL
        return cls.model_validate(
            {
                "id": job.id,
                "created_at": clock.unix(job.created_at),
                "finished_at": clock.unix(job.finished_at) if job.finished_at else None,
                "status": "queued" if job.status == "paused" else job.status,
                "model": job.model,
                "training_file": job.training_file,
                "validation_file": job.validation_file,
                "fine_tuned_model": job.fine_tuned_model,
                "error": job.error,
                "hyperparameters": job.hyperparameters,
                "method": {"type": kind, kind: {"hyperparameters": job.hyperparameters}},
                "organization_id": settings.organization_id,
                "result_files": job.result_files,
                "seed": job.seed,
                "trained_tokens": job.trained_tokens,
                "estimated_finish": (
                    clock.unix(job.estimated_finish)
                    if job.estimated_finish and job.status == "running"
                    else None
                ),
                "metadata": job.metadata_,
                "is_terminal": ended,
                "cancel_requested": job.desired == "cancel" and not ended,
                "pause_requested": job.desired == "pause" and not ended and job.status != "paused",
                "paused_at": clock.unix(job.paused_at) if job.paused_at else None,
                "user_provided_suffix": job.suffix,
                "attempt": job.attempt_no,
                "trained_steps": step.get("step"),
                "total_steps": step.get("total_steps"),
                "dataset_report": report,
                "sample_prompts": job.spec.get("sample_prompts", []),
                "queue_position": place.position,
                "expected_start": (
                    clock.unix(place.expected_start) if place.expected_start else None
                ),
                "memory_needed_bytes": job.memory_needed_bytes,
                "waits_because": place.waits_because,
            }
        )


class JobList(BaseModel):
    """A page of jobs."""

    object: Literal["list"] = "list"
    data: list[JobOut]
    has_more: bool


@router.post("", responses=errors(InvalidRequest, IdempotencyKeyReused, TooManyJobs))
def create_job(
    body: CreateJob,
    caller: CallerDep,
    session: SessionDep,
    settings: SettingsDep,
    catalog: CatalogDep,
    doorbell: DoorbellDep,
    idempotency_key: Annotated[str | None, Header()] = None,
    retry_count: Annotated[
        str | None, Header(alias="x-stainless-retry-count", include_in_schema=False)
    ] = None,
) -> JobOut:
    """Create a fine-tuning job over an uploaded file. What is in the file is checked by the job itself."""
    fingerprint = Fingerprint.of(body, idempotency_key=idempotency_key, retry_count=retry_count)
    job = actions.create(session, catalog, settings, caller, body, fingerprint)
    # Only after the commit: a worker that wakes must find the row. For a repeated call it does no harm.
    doorbell.kick_after_commit(session, "validate")
    return _shown(session, settings, job)


@router.get("", responses=errors(InvalidRequest))
def list_jobs(
    request: Request,
    caller: CallerDep,
    session: SessionDep,
    settings: SettingsDep,
    after: str | None = None,
    limit: Annotated[int, Query(ge=0)] = 20,
) -> JobList:
    """List jobs, newest first; `metadata[key]=value` picks those that carry the pair, `metadata=null` those without."""
    wanted = _filter(request)
    jobs, has_more = actions.list_jobs(
        session, caller.project_id, after=after, limit=limit, wanted=wanted
    )
    steps = actions.progress(session, jobs)
    stand = places(session, jobs, lease_s=settings.lease_s)
    data = [
        JobOut.of(job, settings, steps.get(job.id), stand.get(job.id), in_list=True) for job in jobs
    ]
    return JobList(data=data, has_more=has_more)


@router.get("/{job_id}", responses=errors(NotFound))
def get_job(job_id: str, caller: CallerDep, session: SessionDep, settings: SettingsDep) -> JobOut:
    """Describe a job."""
    job = actions.get(session, caller.project_id, job_id)
    return _shown(session, settings, job)


@router.post("/{job_id}/cancel", responses=errors(InvalidRequest, NotFound))
def cancel_job(
    job_id: str, caller: CallerDep, session: SessionDep, settings: SettingsDep
) -> JobOut:
    """Cancel a job: at once if nobody works on it, else as soon as its worker has stopped."""
    job = wishes.cancel(session, caller.project_id, job_id)
    return _shown(session, settings, job)


@router.post("/{job_id}/pause", responses=errors(InvalidRequest, NotFound))
def pause_job(job_id: str, caller: CallerDep, session: SessionDep, settings: SettingsDep) -> JobOut:
    """Pause a job: at once if it waits for training, else as soon as its worker has saved where it stands."""
    job = wishes.pause(session, caller.project_id, job_id)
    return _shown(session, settings, job)


@router.post("/{job_id}/resume", responses=errors(InvalidRequest, NotFound))
def resume_job(
    job_id: str,
    caller: CallerDep,
    session: SessionDep,
    settings: SettingsDep,
    doorbell: DoorbellDep,
) -> JobOut:
    """Let a paused job go on from where it was: it waits for a worker again."""
    job = wishes.resume(session, caller.project_id, job_id)
    doorbell.kick_after_commit(session, "train")
    return _shown(session, settings, job)


def _shown(session: Session, settings: Settings, job: Job) -> JobOut:
    step = actions.progress(session, [job]).get(job.id)
    place = places(session, [job], lease_s=settings.lease_s).get(job.id)
    return JobOut.of(job, settings, step, place)


def _short(report: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a dataset report without the lines at fault of each file."""
    if report is None:
        return None
    return {
        file: found and {name: value for name, value in found.items() if name != "errors"}
        for file, found in report.items()
    }


def _filter(request: Request) -> JobFilter:
    """Read `metadata[key]=value` and `metadata=null`, which no declared parameter can hold."""
    pairs: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if match := _METADATA.fullmatch(name):
            pairs[match[1]] = value
    if len(pairs) > MAX_METADATA_PAIRS:
        raise InvalidRequest(
            f"A job carries at most {MAX_METADATA_PAIRS} metadata pairs; the filter has {len(pairs)}.",
            param="metadata",
        )
    without = request.query_params.get("metadata")
    if without not in {None, "null"}:
        raise InvalidRequest(
            "Filter with metadata[key]=value, or with metadata=null for jobs that carry none.",
            param="metadata",
        )
    return JobFilter(metadata=pairs or None, without_metadata=without == "null")
