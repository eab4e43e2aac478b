"""What the API does with jobs: create, get, list. To stop them and let them go on is `service.jobs.wishes`.

A create call checks that the model and the files exist; what the files hold is the job's own first step. Whoever
calls `create` rings the doorbell for "validate" after the commit.
"""

import secrets
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from service import clock
from service.db import after_commit
from service.errors import InvalidRequest, NotFound, TooManyJobs
from service.events.actions import NewEvent, append
from service.ids import new_id
from service.jobs import fingerprint as fingerprints
from service.jobs import repository
from service.jobs.consistency import check_together
from service.jobs.fingerprint import Fingerprint
from service.jobs.resolve import as_shown
from service.jobs.spec import MAX_SEED, CreateJob, Method
from service.keys.actions import Caller
from service.logging import get_logger
from service.models.catalog import Catalog
from service.settings import Settings
from service.tables import File, Job, Submission

log = get_logger(__name__)

MAX_PAGE = 100


def create(
    session: Session,
    catalog: Catalog,
    settings: Settings,
    caller: Caller,
    body: CreateJob,
    fingerprint: Fingerprint,
) -> Job:
    """Make a job from `body`, or return the one that this very call has already made.

    Raises:
        InvalidRequest: something asked for is not supported, or the model or a file cannot be used.
        IdempotencyKeyReused: the key came before, with another body.
        TooManyJobs: the project has `max_waiting_jobs` jobs that wait.
    """
    _check_supported(body)
    check_together(body)
    repository.lock_creation(session, caller.project_id)
    first = fingerprints.first_job(session, caller, fingerprint)
    if first is not None:
        return first
    if catalog.get(body.model) is None:
        raise InvalidRequest(
            f"Model {body.model} is not available for fine-tuning or does not exist.",
            param="model",
            code="model_not_found",
        )
    _usable_file(session, caller, "training_file", body.training_file)
    if body.validation_file is not None:
        _usable_file(session, caller, "validation_file", body.validation_file)
    if repository.count_waiting(session, caller.project_id) >= settings.max_waiting_jobs:
        raise TooManyJobs(
            f"There are already {settings.max_waiting_jobs} jobs waiting in this project. Wait until some have"
            " started, or cancel some."
        )
    job = _new_job(caller, body)
    submission = Submission(
        job_id=job.id,
        project_id=caller.project_id,
        api_key_id=caller.key_id,
        idempotency_key=fingerprint.idempotency_key,
        body_sha256=fingerprint.body_sha256,
        created_at=job.created_at,
    )
    repository.insert_job(session, job, submission)
    append(session, job.project_id, job.id, NewEvent(f"Created fine-tuning job: {job.id}"))
    # The one line that has the request's id and the job's: workers know only the latter.
    after_commit(session, lambda: log.info("job_created", job_id=job.id, model=job.model))
    return job


def get(session: Session, project_id: str, job_id: str) -> Job:
    """Return the project's job.

    Raises:
        NotFound: there is none of this id.
    """
    job = repository.get(session, project_id, job_id)
    if job is None:
        raise no_such_job(job_id)
    return job


@dataclass(frozen=True)
class JobFilter:
    """Which jobs a list is about: those that carry all these pairs, or those that carry none."""

    metadata: dict[str, str] | None = None
    without_metadata: bool = False


def list_jobs(
    session: Session, project_id: str, *, after: str | None, limit: int, wanted: JobFilter
) -> tuple[list[Job], bool]:
    """Return up to `limit` jobs (100 at most), newest first, and whether there are more."""
    limit = min(limit, MAX_PAGE)
    jobs = repository.page(
        session,
        project_id,
        after=after,
        limit=limit + 1,
        metadata=wanted.metadata,
        without_metadata=wanted.without_metadata,
    )
    return list(jobs[:limit]), len(jobs) > limit


def progress(session: Session, jobs: list[Job]) -> dict[str, dict[str, Any]]:
    """Return the newest step's metrics of each job that has any."""
    return repository.newest_steps(session, [job.id for job in jobs])


def no_such_job(job_id: str) -> NotFound:
    """Return what to raise of a job that the project does not have."""
    return NotFound(f"No such fine-tuning job: {job_id[:100]}", param="fine_tuning_job_id")


def _check_supported(body: CreateJob) -> None:
    if body.method is not None and body.method.type != "supervised":
        raise InvalidRequest(
            f'Method "{body.method.type}" is not supported yet; only "supervised" is.',
            param="method.type",
            code="unsupported_method",
        )
    if body.integrations:
        kind = body.integrations[0].get("type")
        raise InvalidRequest(
            f"Integration {kind!s:.40} is not supported yet; send no integrations. Metrics are in the job's events"
            " and in its result file.",
            param="integrations",
            code="unsupported_integration",
        )


def _usable_file(session: Session, caller: Caller, param: str, file_id: str) -> File:
    file = repository.lock_file(session, caller.project_id, file_id)
    expired = file is not None and file.expires_at is not None and file.expires_at <= clock.now()
    if file is None or file.deleted_at is not None or expired:
        raise InvalidRequest(f"No such File object: {file_id}", param=param, code="invalid_file_id")
    if file.purpose != "fine-tune":
        raise InvalidRequest(
            f"File {file_id} has purpose '{file.purpose}'; a job needs a file uploaded with purpose 'fine-tune'.",
            param=param,
            code="invalid_file_purpose",
        )
    return file


def _new_job(caller: Caller, body: CreateJob) -> Job:
    requested = body.requested_hyperparameters()
    return Job(
        id=new_id("ftjob-"),
        project_id=caller.project_id,
        created_at=clock.now(),
        status="validating_files",
        model=body.model,
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=body.suffix,
        seed=secrets.randbelow(MAX_SEED + 1) if body.seed is None else body.seed,
        spec={
            "method": {"type": (body.method or Method(type="supervised")).type},
            "hyperparameters": requested,
            "sample_prompts": body.conversations(),
            "integrations": [],
        },
        metadata_=body.metadata,
        hyperparameters=as_shown(requested),
    )
