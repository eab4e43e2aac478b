"""Brings the lines of an attempt's events.jsonl into the job's story, within moments of their writing.

The file is the spool: while the database is away lines wait there, and a relay of a later attempt can still tell them.
"""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, cast

from sqlalchemy.exc import DBAPIError

from service import clock
from service.events.actions import Level, NewEvent
from service.logging import get_logger
from service.queue import story
from service.queue.fence import Fence
from worker.companion import Companion
from worker.context import WorkerContext, outlast

log = get_logger(__name__)

CHECKPOINT = "checkpoint_saved"
RESUME_POINT = "resume_point_saved"
RESUMED = "attempt_resumed"
"""Values of `data.kind` that the parent acts on; the rest it only passes on."""

_LOOK_EVERY_S = 0.15
_BATCH = 200
_READ_BYTES = 4 << 20


@dataclass(frozen=True)
class Line:
    """One line of events.jsonl."""

    n: int
    at: float
    level: Level
    type: Literal["message", "metrics"]
    message: str
    data: dict[str, Any]

    @property
    def kind(self) -> str | None:
        """Which of the engine's events it is, if any."""
        kind = self.data.get("kind")
        return kind if isinstance(kind, str) else None

    def as_event(self) -> NewEvent:
        """Return it as an event of the story."""
        return NewEvent(
            self.message,
            level=self.level,
            type=self.type,
            data=self.data,
            line_no=self.n,
            created_at=datetime.fromtimestamp(self.at, UTC),
        )


class Tail:
    """Reads a file that another process appends to, whole lines only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[Line]:
        """Return the next lines that are complete, up to a few megabytes of them; none: nothing new."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read(_READ_BYTES)
        except FileNotFoundError:
            return []
        whole = data.rfind(b"\n") + 1
        if whole == 0 and len(data) == _READ_BYTES:
            whole = len(
                data
            )  # no line of ours is that long: pass over it rather than wait for its end
        self._offset += whole
        lines = (_parse(raw) for raw in data[:whole].splitlines())
        return [line for line in lines if line is not None]


def _parse(raw: bytes) -> Line | None:
    try:
        value = json.loads(raw)
        data: object = value.get("data")
        return Line(
            n=int(value["n"]),
            at=float(value["at"]),
            level=cast("Level", value["level"]),
            type="metrics" if value["type"] == "metrics" else "message",
            message=str(value["message"]),
            data=cast("dict[str, Any]", data) if isinstance(data, dict) else {},
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        log.warning("line_not_understood", line=raw[:200].decode("utf-8", "replace"))
        return None


class Relay:
    """Tells one attempt's lines from `start` until the file ends after `finish`."""

    def __init__(
        self,
        context: WorkerContext,
        fence: Fence,
        events: Path,
        *,
        on_checkpoint: Callable[[Line], None],
        give_up: threading.Event,
    ) -> None:
        """`on_checkpoint` gets each checkpoint's line; `give_up` ends waiting for the database."""
        self._context = context
        self._fence = fence
        self._tail = Tail(events)
        self._on_checkpoint = on_checkpoint
        self._give_up = give_up
        self._child_gone = threading.Event()
        self._pace = Pace()
        self._thread = Companion(f"relay-{fence.job_id}", self._run)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def finish(self) -> None:
        """Tell what is left of the file, however long the database is away, and end.

        Sooner only if the job has become another attempt's, or it was told to give up.
        """
        self._child_gone.set()
        self._thread.join()

    def check(self) -> None:
        """Raise what ended the thread, if that was an error nobody expected."""
        self._thread.check()

    def _run(self) -> None:
        while True:
            last_look = self._child_gone.is_set()
            lines = self._tail.read()
            self._tell(lines)
            if last_look and not lines:
                return
            if not lines:
                self._child_gone.wait(_LOOK_EVERY_S)

    def _tell(self, lines: Sequence[Line]) -> None:
        for start in range(0, len(lines), _BATCH):
            batch = lines[start : start + _BATCH]
            tell_lines(
                self._context,
                self._fence,
                batch,
                wait=self._give_up.wait,
                estimated_finish=self._pace.estimate(batch),
            )
            for line in batch:
                self._count_step(line)
                if line.kind == CHECKPOINT:
                    self._on_checkpoint(line)

    def _count_step(self, line: Line) -> None:
        took_s = line.data.get("step_time_s")
        if line.type == "metrics" and isinstance(took_s, int | float):
            self._context.metrics.step_seconds.observe(took_s)


class Pace:
    """Guesses when the training ends from how long its last steps took."""

    def __init__(self) -> None:
        self._step_time_s: float | None = None

    def estimate(self, lines: Sequence[Line]) -> datetime | None:
        """Return when the last of `total_steps` will be done, as these lines suggest; None: they say nothing."""
        finish: datetime | None = None
        for line in lines:
            data = line.data
            took, step, total = (data.get(k) for k in ("step_time_s", "step", "total_steps"))
            if not (
                isinstance(took, int | float) and isinstance(step, int) and isinstance(total, int)
            ):
                continue
            before = took if self._step_time_s is None else self._step_time_s
            self._step_time_s = 0.9 * before + 0.1 * took
            finish = clock.now() + timedelta(seconds=self._step_time_s * max(0, total - step))
        return finish


def tell_lines(
    context: WorkerContext,
    fence: Fence,
    lines: Sequence[Line],
    *,
    wait: Callable[[float], bool],
    attempt_no: int | None = None,
    estimated_finish: datetime | None = None,
) -> None:
    """Tell lines in one transaction; if the database refuses them, one by one, leaving out the refused.

    Checkpoints are told when they are published, resume points never.

    Raises:
        Fenced, GivenUp
    """
    events = [line.as_event() for line in lines if line.kind not in (CHECKPOINT, RESUME_POINT)]
    if not events:
        return

    resumed = [line.data.get("from_step") for line in lines if line.kind == RESUMED]

    def tell(some: Sequence[NewEvent]) -> None:
        with context.transaction() as session:
            story.tell(
                session,
                fence,
                some,
                attempt_no=attempt_no,
                estimated_finish=estimated_finish,
                resumed_from_step=resumed[-1] if resumed else None,
            )

    try:
        outlast(lambda: tell(events), wait=wait)
    except DBAPIError:
        log.exception("lines_refused", job_id=fence.job_id)
        for event in events:
            try:
                outlast(lambda event=event: tell([event]), wait=wait)
            except DBAPIError as error:
                log.warning("line_refused", line=event.line_no, reason=str(error)[:200])
