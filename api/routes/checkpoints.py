"""A job's checkpoints: adapters kept from its steps."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel

from api.deps import CallerDep, SessionDep
from api.errors import errors
from service import clock
from service.adapters import actions as adapters
from service.errors import NotFound
from service.jobs import actions as jobs
from service.tables import Checkpoint

router = APIRouter(prefix="/fine_tuning/jobs/{job_id}/checkpoints", tags=["Fine-tuning"])


class CheckpointMetrics(BaseModel):
    """What was measured at a checkpoint's step."""

    step: float
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None


class CheckpointOut(BaseModel):
    """An adapter kept from a step."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: CheckpointMetrics

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "CheckpointOut":
        """Show a checkpoint."""
        return cls(
            id=checkpoint.id,
            created_at=clock.unix(checkpoint.created_at),
            fine_tuned_model_checkpoint=checkpoint.name,
            fine_tuning_job_id=checkpoint.job_id,
            step_number=checkpoint.step_number,
            metrics=CheckpointMetrics.model_validate(checkpoint.metrics),
        )


class CheckpointList(BaseModel):
    """A page of checkpoints."""

    object: Literal["list"] = "list"
    data: list[CheckpointOut]
    first_id: str | None
    last_id: str | None
    has_more: bool


@router.get("", responses=errors(NotFound))
def list_checkpoints(
    job_id: str,
    caller: CallerDep,
    session: SessionDep,
    after: str | None = None,
    limit: Annotated[int, Query(ge=0)] = 10,
) -> CheckpointList:
    """List a job's checkpoints, the latest step first."""
    job = jobs.get(session, caller.project_id, job_id)
    found, has_more = adapters.list_checkpoints(
        session, caller.project_id, job.id, after=after, limit=limit
    )
    data = [CheckpointOut.of(checkpoint) for checkpoint in found]
    return CheckpointList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=has_more,
    )
