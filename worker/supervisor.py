"""One attempt, from its claim to its end, as one slot's thread sees it.

This thread never waits for the database while the child runs: leases, the story and checkpoints have threads of their
own, so the child is stopped in time whatever hangs.
"""

import signal
import threading
import time
from collections.abc import Callable

import structlog

from service.adapters.actions import AdapterIncomplete
from service.errors import ServiceError, StorageFull
from service.logging import get_logger
from service.queue import story
from service.queue.broker import Kind
from service.queue.claim import Claim
from service.queue.fence import Fenced
from worker.checkpoints import Publisher
from worker.companion import Companion
from worker.context import GivenUp, WorkerContext, outlast
from worker.folder import AttemptFolder
from worker.inputs import InputsMissing, prepare
from worker.lease import LeaseKeeper
from worker.limits import TimeLimit, time_limit
from worker.outcome import Cause, Verdict, apply, judge
from worker.reasons import disk_full, is_disk_full, told
from worker.relay import Relay
from worker.spawn import Child

log = get_logger(__name__)

_TICK_S = 0.05
_CANCEL_GRACE_S = 0.5
"""A cancelled child has nothing to save; it gets this long to leave by itself."""


class Supervisor:
    """Runs one attempt. Make one per claim."""

    def __init__(
        self,
        context: WorkerContext,
        claim: Claim,
        *,
        device: str,
        take_child: Callable[[], Child],
        stopping: threading.Event,
        give_up: threading.Event,
        held_since: float,
    ) -> None:
        """Set it up; nothing happens yet.

        Args:
            context: the worker's.
            claim: the work.
            device: "cpu" or "cuda".
            take_child: gives a child without work, as ready as can be.
            stopping: set when the worker is to end: the child saves a resume point.
            give_up: set when even the last words cannot wait any longer.
            held_since: boottime before the claim.
        """
        self._context = context
        self._claim = claim
        self._device = device
        self._take_child = take_child
        self._stopping = stopping
        self._give_up = give_up
        self._folder: AttemptFolder = context.folder(claim.job.id, claim.fence.attempt_no)
        self._keeper = LeaseKeeper(
            context.lease_sessions,
            claim.fence,
            self._folder,
            lease_s=context.settings.lease_s,
            renew_s=context.settings.renew_s,
            held_since=held_since,
        )
        self._time_limit: TimeLimit | None = None

    def run(self) -> None:
        """Run the attempt to its end and write what came of it. Nothing is written once the job is another's."""
        self._context.metrics.claims.labels(self._claim.kind).inc()
        with structlog.contextvars.bound_contextvars(
            job_id=self._claim.job.id, attempt_no=self._claim.fence.attempt_no
        ):
            self._run_to_its_end()

    def _run_to_its_end(self) -> None:
        try:
            self._run_and_conclude()
        except Fenced:
            self._note_fenced()
            log.info("attempt_fenced", **self._names())
        except GivenUp:
            # The lease's end, or this host's next worker, takes the job back; its files are still here.
            log.warning("attempt_left_behind", **self._names())
        finally:
            self._keeper.stop()

    def _run_and_conclude(self) -> None:
        try:
            verdict = self._prepare() or self._train_or_validate()
            if verdict is not None:
                self._conclude(verdict)
        except (Fenced, GivenUp):
            raise
        except Exception as error:
            # The attempt's edge: say why it ended, and let another try, which is not repeated for ever.
            log.exception("attempt_crashed", **self._names())
            reason = f"its worker met an unexpected error ({type(error).__name__}), which its log has in full"
            self._conclude(Verdict("requeue", lost=True, reason=reason))

    def _prepare(self) -> Verdict | None:
        """Begin to renew, and fetch what the child needs; a verdict if that already decides the attempt."""
        try:
            self._folder.create()
            self._keeper.start()
            prepare(
                self._context,
                self._claim,
                self._folder,
                device=self._device,
                give_up=self._give_up,
            )
            self._time_limit = outlast(
                lambda: time_limit(self._context, self._claim), wait=self._give_up.wait
            )
        except InputsMissing as error:
            reason = {"code": error.code, "message": error.message, "param": error.param}
            return Verdict("failed", error=reason)
        except (ServiceError, OSError) as error:
            return _no_room_or_no_answer(error)
        if self._time_limit is not None and self._time_limit.is_over():
            return Verdict("failed", error=self._time_limit.error())
        return None

    def _train_or_validate(self) -> Verdict | None:
        """Run the child and return the verdict; None: the job is another attempt's."""
        publisher = Publisher(
            self._context, self._claim.fence, self._claim.job, give_up=self._give_up
        )
        relay = Relay(
            self._context,
            self._claim.fence,
            self._folder.events,
            on_checkpoint=publisher.add,
            give_up=self._give_up,
        )
        child = self._take_child()
        try:
            child.begin(self._folder.path)
            relay.start()
            publisher.start()
            Companion(f"start-{self._claim.fence.job_id}", lambda: self._note_start(child)).start()
            cause = self._watch(child, relay, publisher)
        finally:
            exit_status = child.end()
            relay.finish()
            publisher.finish()
        relay.check()
        publisher.check()
        if self._keeper.is_fenced:
            self._note_fenced()
            log.info("attempt_fenced", **self._names())
            return None
        return judge(
            self._claim.kind,
            self._folder,
            exit_status,
            cause,
            self._context.settings,
            time_limit=self._time_limit,
        )

    def _note_start(self, child: Child) -> None:
        def note() -> None:
            with self._context.transaction() as session:
                detail = {"device": self._device}
                story.started(session, self._claim.fence, pid=child.pid, detail=detail)

        outlast(note, wait=self._give_up.wait)

    def _watch(self, child: Child, relay: Relay, publisher: Publisher) -> Cause | None:
        """Wait until the child has ended, stopping it where that is due; return why it was stopped.

        Raises what ended the relay or the publisher: a child of which nobody tells is not to go on.
        """
        cause: Cause | None = None
        kill_at: float | None = None
        is_frozen = False
        while not child.has_exited():
            relay.check()
            publisher.check()
            if self._keeper.is_fenced:
                child.signal(signal.SIGKILL)
            elif is_frozen != (not self._keeper.is_safe):
                # Nobody can be asked whether the job is still ours: hold it, go on when the answer comes.
                is_frozen = not is_frozen
                child.signal(signal.SIGSTOP if is_frozen else signal.SIGCONT)
                log.warning("child_frozen" if is_frozen else "child_goes_on", **self._names())
            reason = self._reason_to_stop()
            if reason not in (None, cause) and (cause is None or reason == "cancel"):
                # A cancel comes through also while the child saves what a pause wants saved.
                cause = reason
                child.signal(signal.SIGTERM)
                is_cancel = cause == "cancel"
                grace_s = _CANCEL_GRACE_S if is_cancel else self._context.settings.stop_grace_s
                kill_at = time.monotonic() + grace_s
            if kill_at is not None and time.monotonic() >= kill_at:
                child.signal(signal.SIGKILL)
            time.sleep(_TICK_S)
        return cause

    def _reason_to_stop(self) -> Cause | None:
        desired = self._keeper.desired
        if desired == "cancel":
            return "cancel"
        if self._time_limit is not None and self._time_limit.is_over():
            return "time_limit"
        if self._claim.kind == "train" and (desired == "pause" or desired == "preempt"):
            return desired
        return "shutdown" if self._stopping.is_set() else None

    def _conclude(self, verdict: Verdict) -> None:
        """Write the verdict, however long the database is away."""
        try:
            waiting = self._write(verdict)
        except (ServiceError, AdapterIncomplete, OSError) as error:
            # The adapter cannot be stored. It is still in the attempt's folder, so another attempt may manage.
            verdict = _no_room_or_no_answer(error)
            waiting = self._write(verdict)
        outcome = "lost" if verdict.lost else verdict.kind
        self._context.metrics.ended.labels(self._claim.kind, outcome).inc()
        log.info(
            "attempt_ended",
            outcome=verdict.kind,
            reason=verdict.reason,
            log_tail=verdict.detail.get("log_tail"),
            **self._names(),
        )
        if verdict.kind != "requeue":
            self._drop_folders()
        if waiting is not None:
            self._context.doorbell.kick(waiting)

    def _note_fenced(self) -> None:
        self._context.metrics.leases_lost.labels(self._claim.kind).inc()

    def _write(self, verdict: Verdict) -> Kind | None:
        return outlast(
            lambda: apply(self._context, self._claim, self._folder, verdict),
            wait=self._give_up.wait,
        )

    def _drop_folders(self) -> None:
        """The job has ended, or its files are checked: what was only needed to get there goes."""
        attempt_nos = [self._claim.fence.attempt_no]
        if self._claim.kind == "train":
            attempt_nos = list(range(1, self._claim.fence.attempt_no + 1))
        for attempt_no in attempt_nos:
            self._context.folder(self._claim.job.id, attempt_no).drop_heavy_parts()

    def _names(self) -> dict[str, object]:
        return {
            "job_id": self._claim.job.id,
            "attempt_no": self._claim.fence.attempt_no,
            "kind": self._claim.kind,
        }


def _no_room_or_no_answer(error: Exception) -> Verdict:
    """The disk is full: say so and end. Anything else passes: try again, but not forever."""
    if isinstance(error, StorageFull) or is_disk_full(error):
        return Verdict("failed", error=disk_full(error))
    if isinstance(error, AdapterIncomplete):
        reason = {"code": "adapter_incomplete", "message": str(error), "param": None}
        return Verdict("failed", error=reason)
    log.warning("files_not_read_or_written", reason=str(error))
    return Verdict(
        "requeue", lost=True, reason=f"its files could not be read or written: {told(error)}"
    )
