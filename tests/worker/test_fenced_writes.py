"""Everything that a worker writes, tried by one whose job went to another: it is told so, and no table changes."""

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session, sessionmaker

from service.db import transaction
from service.queue import finish, lease, story
from service.queue.claim import Claim, claim
from service.queue.fence import Fenced
from service.settings import Settings
from service.tables import Base
from tests.worker.conftest import Submit, chat_lines
from worker.checkpoints import publish
from worker.context import WorkerContext
from worker.crew import Crew
from worker.inputs import take_over
from worker.outcome import Verdict, apply
from worker.relay import CHECKPOINT, RESUMED, Line, tell_lines

Tables = dict[str, list[tuple[Any, ...]]]
ERROR = {"code": "c", "message": "m", "param": None}
KIND = "train"


def of_line(n: int, **data: object) -> Line:
    return Line(n, 1.0, "info", "message", f"m{n}", dict(data))


def write_adapter(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes(b"{}")
    return folder


@pytest.fixture
def context(settings: Settings) -> Iterator[WorkerContext]:
    """A worker that was never started."""
    crew = Crew(settings)
    yield crew.context
    crew.stop()


@pytest.fixture
def zombie(submit: Submit, sessions: sessionmaker[Session], context: WorkerContext) -> Claim:
    """A training attempt of this worker, whose job is the next attempt's of another."""
    submit(chat_lines(12))

    def take(kind: Any, worker_id: str) -> Claim:
        with transaction(sessions) as session:
            taken = claim(session, kind=kind, worker_id=worker_id, host="here", lease_s=60)
        assert taken is not None
        return taken

    checked = take("validate", context.worker_id)
    with transaction(sessions) as session:
        finish.validated(session, checked.fence, report={}, hyperparameters={})
    slow = take(KIND, context.worker_id)
    folder = context.folder(slow.job.id, slow.fence.attempt_no)
    folder.create()
    write_adapter(folder.run / "adapter")
    with transaction(sessions) as session:
        finish.give_back(session, slow.fence, lost=True, reason="it was slow", max_attempts=3)
    take(KIND, "worker_other")
    return slow


def everything(engine: Engine) -> Tables:
    with engine.connect() as connection:
        return {
            table.name: sorted(map(tuple, connection.execute(select(table))), key=repr)
            for table in Base.metadata.sorted_tables
        }


def verdict(kind: Any, **more: Any) -> Callable[[WorkerContext, Claim], object]:
    def write(context: WorkerContext, run: Claim) -> object:
        folder = context.folder(run.job.id, run.fence.attempt_no)
        return apply(context, run, folder, Verdict(kind, **more))

    return write


def in_transaction(act: Callable[[Session, Claim], object]) -> Callable[..., object]:
    def write(context: WorkerContext, run: Claim) -> object:
        with context.transaction() as session:
            return act(session, run)

    return write


def checkpoint(context: WorkerContext, run: Claim) -> None:
    folder = write_adapter(context.folder(run.job.id, run.fence.attempt_no).run / "step-5")
    line = of_line(1, kind=CHECKPOINT, step=5, folder=str(folder))
    publish(context, run.fence, run.job, run.fence.attempt_no, line, give_up=threading.Event())


def lost_checkpoint(context: WorkerContext, run: Claim) -> None:
    line = of_line(1, kind=CHECKPOINT, step=5, folder="/nowhere")  # it is told as a warning
    publish(context, run.fence, run.job, run.fence.attempt_no, line, give_up=threading.Event())


def told(context: WorkerContext, run: Claim) -> None:
    lines = [of_line(1), of_line(2, kind=RESUMED, from_step=3)]
    tell_lines(context, run.fence, lines, wait=threading.Event().wait)


def taken_over(context: WorkerContext, run: Claim) -> None:
    """Tell the story of a predecessor: here of the attempt itself, as the next of the same job would."""
    folder = context.folder(run.job.id, run.fence.attempt_no)
    (folder.run / "resume" / "step-3").mkdir(parents=True)
    line = '{"n": 1, "at": 1.0, "level": "info", "type": "message", "message": "m", "data": {}}\n'
    folder.events.write_text(line, encoding="utf-8")
    later = finish_as_next(run)
    take_over(context, later, threading.Event())


def finish_as_next(run: Claim) -> Claim:
    """A claim of an attempt after the zombie's that this worker never got."""
    fence = story.Fence(
        run.fence.job_id,
        run.fence.project_id,
        run.fence.attempt_no + 1,
        run.fence.worker_id,
    )
    return Claim(run.kind, run.job, fence, run.blobs)


WRITES: dict[str, Callable[[WorkerContext, Claim], object]] = {
    "renew": in_transaction(lambda session, run: lease.renew(session, run.fence, 60)),
    "read a wish": in_transaction(lambda session, run: lease.read_desired(session, run.fence)),
    "started": in_transaction(lambda s, run: story.started(s, run.fence, pid=1, detail={"a": 1})),
    "tell lines": told,
    "tell a predecessor's": taken_over,
    "checkpoint": checkpoint,
    "checkpoint that is lost": lost_checkpoint,
    "succeeded": verdict(
        "succeeded",
        result={"adapter": "run/adapter", "adapter_step": 5, "trained_tokens": 1},
    ),
    "failed": verdict("failed", error=ERROR),
    "cancelled": verdict("cancelled"),
    "stopped": verdict("requeue", reason="it was to be paused"),
    "lost": verdict("requeue", lost=True, detail={"exit_status": -signal.SIGKILL}),
    "validated": in_transaction(
        lambda s, run: finish.validated(s, run.fence, report={}, hyperparameters={})
    ),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_an_attempt_whose_job_is_anothers_changes_no_table(
    context: WorkerContext,
    zombie: Claim,
    engine: Engine,
    write: Callable[[WorkerContext, Claim], object],
) -> None:
    before = everything(engine)

    with pytest.raises(Fenced):
        write(context, zombie)

    after = everything(engine)
    assert {name for name in after if after[name] != before[name]} == set()
