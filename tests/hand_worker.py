"""A worker's part played by hand: the very service functions a worker calls, step by step, without an engine.

So tests of the API can bring a job into any state, and decide when each thing happens.
"""

from pathlib import Path
from typing import Any, Literal

from sqlalchemy.orm import Session, sessionmaker

from service.adapters import actions as adapters
from service.adapters import names
from service.db import transaction
from service.events.actions import NewEvent, append
from service.files.actions import register_produced
from service.jobs.resolve import resolve_hyperparameters
from service.queue import finish
from service.queue.claim import Claim, claim
from service.settings import Settings
from service.storage import Storage
from service.tables import Checkpoint

WEIGHTS = bytes(range(256)) * 40 + b"end"  # an odd length, so that padding matters
REPORT: dict[str, Any] = {
    "training_file": {"format": "chat", "n_examples": 12, "n_errors": 1, "errors": [{"line": 3}]},
    "validation_file": None,
}


class HandWorker:
    """Claims jobs and moves them along."""

    def __init__(
        self, sessions: sessionmaker[Session], settings: Settings, storage: Storage, scratch: Path
    ) -> None:
        self._sessions = sessions
        self._settings = settings
        self._storage = storage
        self._scratch = scratch

    def claim(self, kind: Literal["validate", "train"]) -> Claim:
        """Take the next piece of work; there must be one."""
        with transaction(self._sessions) as session:
            taken = claim(session, kind=kind, worker_id="worker_hand", host="here", lease_s=600)
        assert taken is not None, f"no work to {kind}"
        return taken

    def validate(self) -> None:
        """Take a job to validate and find its files good."""
        taken = self.claim("validate")

        class Report:
            n_examples = REPORT["training_file"]["n_examples"]

        numbers = resolve_hyperparameters(taken.job.spec["hyperparameters"], Report(), 512)
        with transaction(self._sessions) as session:
            finish.validated(session, taken.fence, report=REPORT, hyperparameters=numbers)

    def start(self) -> Claim:
        """Take a job through validation and begin its training."""
        self.validate()
        return self.claim("train")

    def tell(self, run: Claim, *events: NewEvent) -> None:
        """Add to the job's story, in one transaction."""
        with transaction(self._sessions) as session:
            append(session, run.job.project_id, run.job.id, *events)

    def step(self, run: Claim, step: int, total: int = 10, **data: Any) -> None:
        """Tell a step's metrics."""
        content = {"step": step, "total_steps": total, "train_loss": 1 / step, **data}
        event = NewEvent(
            f"Step {step}/{total}: training loss={1 / step:.2f}",
            type="metrics",
            data=content,
            attempt_no=run.fence.attempt_no,
        )
        self.tell(run, event)

    def folder(self, name: str, **files: bytes) -> Path:
        """Write an adapter's folder; dots in names are written as `__`."""
        folder = self._scratch / name
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "adapter_config.json": b"{}",
            "adapter_model.safetensors": WEIGHTS,
            "empty.txt": b"",
        } | {key.replace("__", "."): value for key, value in files.items()}
        for file, data in content.items():
            (folder / file).write_bytes(data)
        return folder

    def checkpoint(self, run: Claim, step: int, **metrics: Any) -> Checkpoint:
        """Publish a checkpoint and tell it."""
        folder = self.folder(f"{run.job.id}-{run.fence.attempt_no}-{step}")
        with transaction(self._sessions) as session:
            adapter = adapters.publish(
                session, self._storage, run.job, run.fence.attempt_no, step, folder
            )
        with transaction(self._sessions) as session:
            saved = adapters.save_checkpoint(
                session,
                run.job,
                adapter,
                organization=self._settings.organization_id,
                metrics=metrics,
            )
            message = f"Checkpoint created at step {step} with Snapshot ID: {saved.name}"
            append(session, run.job.project_id, run.job.id, NewEvent(message))
        return saved

    def succeed(self, run: Claim, *, step: int = 10) -> None:
        """Publish the adapter and end the job well."""
        folder = self.folder(f"{run.job.id}-{run.fence.attempt_no}-{step}")
        with transaction(self._sessions) as session:
            adapters.publish(session, self._storage, run.job, run.fence.attempt_no, step, folder)
        with transaction(self._sessions) as session:
            results = register_produced(
                session,
                run.job.project_id,
                filename="step_metrics.csv",
                purpose="fine-tune-results",
                blob_key=f"results/{run.job.id}",
                bytes=1,
                sha256="0" * 64,
            )
            finish.succeeded(
                session,
                run.fence,
                fine_tuned_model=names.fine_tuned_model_name(
                    run.job, self._settings.organization_id
                ),
                adapter_step=step,
                trained_tokens=1234,
                result_file=results.id,
                detail={},
            )

    def fail(self, run: Claim) -> None:
        """End the job with an error."""
        error = {"code": "loss_not_finite", "message": "The loss is not a number.", "param": None}
        with transaction(self._sessions) as session:
            finish.failed(
                session,
                run.fence,
                error | {"hint": "Use a lower learning rate."},
                detail={finish.LOG_TAIL: "step 3\nNaN"},
            )

    def stopped(self, run: Claim) -> None:
        """Say that the child has stopped in good order, with its work unfinished."""
        with transaction(self._sessions) as session:
            finish.give_back(session, run.fence, lost=False, reason="it stopped", max_attempts=3)

    def cancelled(self, run: Claim) -> None:
        """Say that the child is gone."""
        with transaction(self._sessions) as session:
            finish.cancelled(session, run.fence)
