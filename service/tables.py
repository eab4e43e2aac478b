"""The tables. Every one that a team's data lives in carries `project_id`.

A reader's likely mistake: `Job.status` is written by `service.jobs.state.move` alone, and every write of a worker
carries the fence (`attempt_no`, and that the job is leased and still in the status it was claimed in).
"""

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    Index,
    MetaData,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

DEFAULT_PROJECT = "proj_default"

JOB_STATUSES = (
    "validating_files",
    "queued",
    "running",
    "paused",
    "succeeded",
    "failed",
    "cancelled",
)
"""OpenAI's six, and `paused`, which the API shows as `queued`. The first four are live."""


class Base(DeclarativeBase):
    """Names every constraint, so that migrations can name them too."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012  (SQLAlchemy reads it from the class)
        str: Text,
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB(none_as_null=True),
        list[Any]: JSONB(none_as_null=True),
    }


class Project(Base):
    """A team's room: everything belongs to one project."""

    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    weight: Mapped[int] = mapped_column(server_default=text("1"))  # its share of the workers
    created_at: Mapped[datetime]


class ApiKey(Base):
    """A bearer key, kept as the SHA-256 of its 256 random bits."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str]
    hint: Mapped[str]  # the first letters, to tell keys apart in a list
    sha256: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime]
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class File(Base):
    """An uploaded or produced file; its bytes are the blob `blob_key`."""

    __tablename__ = "files"
    __table_args__ = (Index("ix_files_list", "project_id", "created_at", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    filename: Mapped[str]
    purpose: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    blob_key: Mapped[str]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    deleted_at: Mapped[
        datetime | None
    ]  # the blob outlives the row's visibility while a live job needs it


class Job(Base):
    """A fine-tuning job: what was asked (frozen), how it stands, and who works on it."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(
            "status IN ('validating_files','queued','running','paused','succeeded','failed','cancelled')",
            name="status",
        ),
        CheckConstraint("desired IN ('run','pause','preempt','cancel')", name="desired"),
        Index("ix_jobs_list", "project_id", "created_at", "id"),
        Index(
            "ix_jobs_turn",  # of each project the next one to be claimed
            "status",
            "project_id",
            text("priority DESC"),
            "created_at",
            "id",
            postgresql_where=text(
                "lease_owner IS NULL AND status IN ('validating_files','queued')"
            ),
        ),
        Index(
            "ix_jobs_claim",
            "status",
            "priority",
            "created_at",
            postgresql_where=text("status IN ('validating_files','queued','running','paused')"),
        ),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    status: Mapped[str]
    paused_at: Mapped[datetime | None]  # since when it is paused; None: it is not
    desired: Mapped[str] = mapped_column(server_default=text("'run'"))  # a wish the worker fulfils

    # What was asked; never changed afterwards.
    model: Mapped[str]
    training_file: Mapped[str] = mapped_column(ForeignKey("files.id"))
    validation_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    suffix: Mapped[str | None]
    seed: Mapped[int]
    spec: Mapped[dict[str, Any]]  # method, hyperparameters as sent, sample_prompts, integrations
    metadata_: Mapped[dict[str, Any] | None] = mapped_column("metadata")

    # What came of it.
    hyperparameters: Mapped[dict[str, Any]]  # "auto" until validation resolves them
    dataset_report: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]  # {code, message, param, hint?}
    fine_tuned_model: Mapped[str | None] = mapped_column(unique=True)
    adapter_step: Mapped[
        int | None
    ]  # which of the last attempt's adapters it offers: the last or the best
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    estimated_finish: Mapped[datetime | None]
    result_files: Mapped[list[Any]] = mapped_column(server_default=text("'[]'::jsonb"))

    # The queue.
    priority: Mapped[int] = mapped_column(server_default=text("0"))  # higher first
    not_before: Mapped[datetime | None]
    memory_needed_bytes: Mapped[int | None] = mapped_column(
        BigInteger
    )  # on a GPU, as validation estimated it; None: unknown, so it is tried anywhere
    unfit_told_at: Mapped[datetime | None]  # when its story said that no worker's GPU has as much
    attempt_no: Mapped[int] = mapped_column(server_default=text("0"))  # the fence
    lost_attempts: Mapped[int] = mapped_column(server_default=text("0"))
    lease_owner: Mapped[str | None]  # a worker's id; None: nobody works on it
    lease_until: Mapped[datetime | None]
    seq: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))  # last event's number


class Attempt(Base):
    """One run of a job or of its validation."""

    __tablename__ = "attempts"
    __table_args__ = (
        # At most one live attempt per job, whatever our code believes.
        Index("uq_attempts_live", "job_id", unique=True, postgresql_where=text("ended_at IS NULL")),
    )

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    attempt_no: Mapped[int] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    kind: Mapped[str]  # validate | train
    worker_id: Mapped[str]
    host: Mapped[str]
    pid: Mapped[int | None]  # of the child
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str | None]  # succeeded | failed | cancelled | lost | requeued | paused
    resumed_from_step: Mapped[int | None]
    detail: Mapped[dict[str, Any] | None]  # versions, device, exit code, log tail


class Event(Base):
    """A line of a job's story. Metrics are events of type `metrics`; both share `seq`, the SSE id."""

    __tablename__ = "events"
    __table_args__ = (
        # A step is told once per attempt, however often a file is read again.
        Index(
            "uq_events_attempt_line",
            "job_id",
            "attempt_no",
            "line_no",
            unique=True,
            postgresql_where=text("line_no IS NOT NULL"),
        ),
    )

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    created_at: Mapped[datetime]
    level: Mapped[str]  # info | warn | error
    type: Mapped[str]  # message | metrics
    message: Mapped[str]
    data: Mapped[dict[str, Any] | None]
    attempt_no: Mapped[int | None]
    line_no: Mapped[int | None]  # of the attempt's events.jsonl, where it came from there


class Adapter(Base):
    """LoRA weights offered for download: the last ones of a job, or a checkpoint's."""

    __tablename__ = "adapters"
    __table_args__ = (
        Index("uq_adapters_attempt_step", "job_id", "attempt_no", "step_number", unique=True),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    attempt_no: Mapped[int]
    step_number: Mapped[int]
    files: Mapped[list[Any]]  # [{name, bytes, sha256, blob_key}], sorted by name, manifest included
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime]


class Checkpoint(Base):
    """An adapter kept from a step, as OpenAI lists them."""

    __tablename__ = "checkpoints"
    __table_args__ = (Index("uq_checkpoints_job_step", "job_id", "step_number", unique=True),)

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    attempt_no: Mapped[int]
    step_number: Mapped[int]
    name: Mapped[str] = mapped_column(unique=True)  # ft:…:ckpt-step-N
    metrics: Mapped[dict[str, Any]]
    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"))
    created_at: Mapped[datetime]


class Submission(Base):
    """The fingerprint of a create call, so that a retried one finds its first job."""

    __tablename__ = "submissions"
    __table_args__ = (Index("ix_submissions_body", "project_id", "body_sha256", "created_at"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    api_key_id: Mapped[str]
    idempotency_key: Mapped[str | None]
    body_sha256: Mapped[str]
    created_at: Mapped[datetime]


Index(
    "uq_submissions_idempotency_key",
    Submission.project_id,
    Submission.idempotency_key,
    unique=True,
    postgresql_where=text("idempotency_key IS NOT NULL"),
)


class Outbox(Base):
    """What must be told to the outside after a commit; webhooks will be sent from it."""

    __tablename__ = "outbox"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    type: Mapped[str]  # fine_tuning.job.succeeded | failed | cancelled
    created_at: Mapped[datetime]
    delivered_at: Mapped[datetime | None]


class Worker(Base):
    """A worker process that is, or was, alive."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(primary_key=True)  # new at each start: an incarnation
    host: Mapped[str]
    pid: Mapped[int]
    slots: Mapped[
        dict[str, Any]
    ]  # {"train": n, "validate": n, "devices": [{name, memory_bytes, …}]}
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime]
    stopped_at: Mapped[datetime | None]
