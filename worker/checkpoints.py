"""Publishes what the child saved: files into the storage, then a row and the event that names it.

In a thread of its own: copying a large adapter must not hold up the metrics.
"""

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.adapters import actions as adapters
from service.adapters.actions import AdapterIncomplete
from service.errors import StorageFull, Unavailable
from service.events.actions import NewEvent
from service.logging import get_logger
from service.queue import story
from service.queue.fence import Fence, hold
from service.tables import Job
from worker.companion import Companion
from worker.context import WorkerContext, outlast
from worker.reasons import told
from worker.relay import Line

log = get_logger(__name__)

_LONGEST_OUTAGE_S = 600.0
"""A storage that is away longer costs the checkpoint: wrong credentials look like an outage, too."""
_LONGEST_PAUSE_S = 5.0


class Publisher:
    """Publishes the checkpoints of one attempt in order, from `start` until the last after `finish`."""

    def __init__(
        self, context: WorkerContext, fence: Fence, job: Job, *, give_up: threading.Event
    ) -> None:
        self._context = context
        self._fence = fence
        self._job = job
        self._give_up = give_up
        self._over = threading.Event()
        self._waiting: queue.SimpleQueue[tuple[int, Line] | None] = queue.SimpleQueue()
        self._thread = Companion(f"checkpoints-{fence.job_id}", self._run)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def add(self, line: Line, *, attempt_no: int | None = None) -> None:
        """Publish what a checkpoint's line tells of; `attempt_no`: whose line it is, if not this attempt's."""
        self._waiting.put((self._fence.attempt_no if attempt_no is None else attempt_no, line))

    def finish(self) -> None:
        """Publish what was added, and end."""
        self._over.set()
        self._waiting.put(None)
        self._thread.join()

    def check(self) -> None:
        """Raise what ended the thread, if that was an error nobody expected."""
        self._thread.check()

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            attempt_no, line = item
            publish(
                self._context,
                self._fence,
                self._job,
                attempt_no,
                line,
                give_up=self._give_up,
                over=self._over,
            )


def publish(
    context: WorkerContext,
    fence: Fence,
    job: Job,
    attempt_no: int,
    line: Line,
    *,
    give_up: threading.Event,
    over: threading.Event | None = None,
) -> None:
    """Make the checkpoint of a line downloadable and tell of it. Doing it again changes nothing.

    One that cannot be stored (no room, or its folder is incomplete) is told as a warning: the training goes on. A storage that
    does not answer is asked again until `over` is set (one last time then), but not for ever.

    Raises:
        Fenced, GivenUp
    """
    step, folder = line.data.get("step"), line.data.get("folder")
    if not isinstance(step, int) or not isinstance(folder, str):
        log.warning("checkpoint_line_not_understood", job_id=fence.job_id, line=line.n)
        return

    def store_and_tell() -> None:
        with context.transaction() as session:
            adapter = adapters.publish(
                session, context.storage, job, attempt_no, step, Path(folder)
            )
            hold(session, fence)
        with context.transaction() as session:
            hold(session, fence)
            checkpoint = adapters.save_checkpoint(
                session,
                job,
                adapter,
                organization=context.settings.organization_id,
                metrics=line.data,
            )
            event = _created(line, step, checkpoint.name)
            story.tell(session, fence, [event], attempt_no=attempt_no)

    try:
        _outlast_storage(
            lambda: outlast(store_and_tell, wait=give_up.wait),
            over=give_up if over is None else over,
        )
    except (StorageFull, Unavailable, AdapterIncomplete, OSError) as error:
        log.warning("checkpoint_not_published", job_id=fence.job_id, reason=str(error))
        event = NewEvent(
            f"The checkpoint of step {step} could not be kept: {told(error)}",
            level="warn",
            data={"kind": line.kind, "step": step},
            line_no=line.n,
        )

        def warn() -> None:
            with context.transaction() as session:
                story.tell(session, fence, [event], attempt_no=attempt_no)

        outlast(warn, wait=give_up.wait)


def _outlast_storage(act: Callable[[], None], *, over: threading.Event) -> None:
    deadline = time.monotonic() + _LONGEST_OUTAGE_S
    pause_s = 0.2
    is_last = False
    while True:
        try:
            return act()
        except Unavailable as error:
            if is_last:
                raise
            log.warning("storage_does_not_answer", reason=str(error))
            is_last = over.wait(pause_s) or time.monotonic() > deadline
            pause_s = min(_LONGEST_PAUSE_S, pause_s * 2)


def _created(line: Line, step: int, name: str) -> NewEvent:
    data: dict[str, Any] = {k: v for k, v in line.data.items() if k != "folder"}
    event = line.as_event()
    return NewEvent(
        f"Checkpoint created at step {step} with Snapshot ID: {name}",
        data=data | {"fine_tuned_model_checkpoint": name},
        line_no=line.n,
        created_at=event.created_at,
    )
