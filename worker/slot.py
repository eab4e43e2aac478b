"""A slot: room for one attempt at a time, with a thread that lives as long as the worker.

The thread claims, supervises and claims again until nothing is left, then waits to be rung or for `poll_s`. It alone starts
the slot's children: they die with the thread that started them.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from sqlalchemy.exc import SQLAlchemyError

from service.logging import get_logger
from service.queue.broker import Kind
from service.queue.claim import Claim, claim
from service.queue.fit import room
from worker.context import WorkerContext
from worker.gpu import Gpu
from worker.lease import boottime
from worker.locks import Lock, gpu_lock_path, try_lock
from worker.probe import why_unusable
from worker.spawn import Child, child_environment
from worker.supervisor import Supervisor

log = get_logger(__name__)

ENGINE_MISSING = (
    "This worker cannot train, since the engine is not installed: pip install 'nibble[engine]', or set"
    " NIBBLE_TRAIN_SLOTS=0 where it is only to validate."
)
_BUSY_GPU_S = 5.0


@dataclass(frozen=True)
class Place:
    """What a slot is for, and on what."""

    kind: Kind
    number: int
    gpu: Gpu | None = None

    @property
    def device(self) -> str:
        """In the engine's words."""
        return "cpu" if self.gpu is None else "cuda"

    @property
    def environment(self) -> dict[str, str]:
        """What its children's environment adds: they see their own GPU, or none."""
        return {"CUDA_VISIBLE_DEVICES": "" if self.gpu is None else self.gpu.uuid}


class Slot:
    """One slot and its thread."""

    def __init__(
        self, context: WorkerContext, place: Place, *, identity: Lock, give_up: threading.Event
    ) -> None:
        """`identity` is the worker's lock, which children hold too; `give_up` ends waiting for the database."""
        self._context = context
        self._place = place
        self._identity = identity
        self._give_up = give_up
        self._gpu_lock: Lock | None = None
        self._spare: Child | None = None
        self._problem: str | None = None
        self._rung = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"{place.kind}-{place.number}", daemon=True
        )

    @property
    def kind(self) -> Kind:
        """Which kind of work it takes."""
        return self._place.kind

    @property
    def place(self) -> Place:
        """What it is for, and on what."""
        return self._place

    @property
    def problem(self) -> str | None:
        """Why it takes no work, in a sentence that says what to do; None: it does."""
        return self._problem

    def start(self) -> None:
        """Begin to look for work."""
        self._thread.start()

    def ring(self) -> None:
        """Have it look for work now, or again if it is at work."""
        self._rung.set()

    def stop(self) -> None:
        """Have it stop its child, give its work back, and end; does not wait."""
        self._stopping.set()
        self._rung.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the end; False: it has not come in time."""
        if self._thread.is_alive():  # one that was never started has ended, too
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            if self._hold_gpu() and self._can_work():
                self._look_for_work()
        finally:
            if self._spare is not None:
                self._spare.dismiss()
            if self._gpu_lock is not None:
                self._gpu_lock.release()

    def _hold_gpu(self) -> bool:
        """Wait until the GPU is nobody else's; False: the worker stops before that."""
        gpu = self._place.gpu
        if gpu is None:
            return True
        path = gpu_lock_path(gpu.uuid)
        while (lock := try_lock(path)) is None:
            log.warning("gpu_held_by_another_worker", gpu=gpu.uuid, lock=str(path))
            if self._stopping.wait(_BUSY_GPU_S):
                return False
        self._gpu_lock = lock
        return True

    def _can_work(self) -> bool:
        """Look whether the engine is here, and try a kernel on the slot's GPU; else say what to install."""
        if self._place.kind == "train" and find_spec("torch") is None:
            self._problem = ENGINE_MISSING
        elif self._place.gpu is not None:
            self._problem = why_unusable(child_environment() | self._place.environment)
        if self._problem is not None:
            log.error("slot_unusable", slot=self._thread.name, reason=self._problem)
        return self._problem is None

    def _look_for_work(self) -> None:
        while not self._stopping.is_set():
            self._keep_a_spare()
            self._rung.clear()  # before the look: a ring during it means another look
            try:
                while not self._stopping.is_set() and self._work_once():
                    self._keep_a_spare()
            except SQLAlchemyError as error:
                log.warning("no_claim", slot=self._thread.name, reason=str(error)[:200])
            except Exception:
                # The thread's edge: a job that trips us is taken back when its lease ends; the slot must live on.
                log.exception("attempt_crashed", slot=self._thread.name)
            self._rung.wait(self._context.settings.poll_s)

    def _work_once(self) -> bool:
        """Claim and run one attempt; False: nothing waits."""
        held_since = boottime()
        claimed = self._claim()
        if claimed is None:
            return False
        Supervisor(
            self._context,
            claimed,
            device=self._place.device,
            take_child=self._take_child,
            stopping=self._stopping,
            give_up=self._give_up,
            held_since=held_since,
        ).run()
        return True

    def _claim(self) -> Claim | None:
        gpu = self._place.gpu
        with self._context.transaction() as session:
            return claim(
                session,
                kind=self._place.kind,
                worker_id=self._context.worker_id,
                host=self._context.host,
                lease_s=self._context.settings.lease_s,
                room_bytes=None if gpu is None else room(gpu.memory_bytes),
            )

    def _keep_a_spare(self) -> None:
        """Have a child stand ready, with everything imported that it will need."""
        if self._stopping.is_set():
            return
        if self._spare is not None and self._spare.has_exited():
            log.warning("spare_died", slot=self._thread.name, exit_status=self._spare.end())
            self._spare = None
        if self._spare is None:
            self._spare = self._new_child()

    def _take_child(self) -> Child:
        spare, self._spare = self._spare, None
        if spare is not None and not spare.has_exited():
            return spare
        if spare is not None:
            spare.end()
        return self._new_child()

    def _new_child(self) -> Child:
        held: Sequence[Lock | None] = (self._identity, self._gpu_lock)
        return Child(
            self._place.kind,
            environment=self._place.environment,
            inherit=[lock.fd for lock in held if lock is not None],
        )
