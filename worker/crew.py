"""All of a worker process but its ears: the slots, the heartbeat, and what former workers of this host left.

Works without the broker; Celery (worker.app) only rings.
"""

import os
import socket
import threading
import time
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from service.db import connect, sessions, transaction
from service.ids import new_id
from service.logging import get_logger
from service.models.catalog import Catalog
from service.queue.broker import Kind
from service.queue.kick import Doorbell
from service.queue.lease import release_leases_of
from service.queue.workers import WorkerSlots, sign_in, sign_out
from service.settings import Settings
from service.storage import Storage
from worker import gpu
from worker.context import WorkerContext
from worker.gpu import Gpu
from worker.locks import Incarnations, Lock
from worker.slot import Place, Slot
from worker.sweep import sweep

log = get_logger(__name__)

_HEARTBEAT_S = 10.0
_SWEEP_S = 3600.0
_LAST_WORDS_S = 5.0
"""How long, after `stop_grace_s`, a stopping worker goes on trying to tell the database."""


class Crew:
    """One per process. `start` returns at once; `stop` returns when no child is left."""

    def __init__(self, settings: Settings) -> None:
        """Read the catalog and open the storage; nothing runs yet.

        Raises:
            DatabaseUrlMissing, RedisUrlMissing, CatalogError, StorageUrlInvalid: the settings do not do.
        """
        host = socket.gethostname()
        self._settings = settings
        self._engine = connect(settings)
        self._lease_engine = connect(settings)
        self.context = WorkerContext(
            settings=settings,
            sessions=sessions(self._engine),
            lease_sessions=sessions(self._lease_engine),
            storage=Storage.open(settings),
            catalog=Catalog.load(settings.models_file),
            doorbell=Doorbell(settings),
            worker_id=new_id("worker_"),
            host=host,
        )
        self._incarnations = Incarnations(settings.data_dir, host)
        self._identity: Lock = self._incarnations.take(self.context.worker_id)
        self._give_up = threading.Event()
        self._stopping = threading.Event()
        self.slots = self._make_slots()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Release what dead workers of this host held, sign in, and begin to look for work."""
        self._heart.start()
        for slot in self.slots:
            slot.start()
        log.info(
            "worker_started",
            worker_id=self.context.worker_id,
            slots=[f"{slot.kind} on {slot.place.device}" for slot in self.slots],
        )

    def ring(self, kind: Kind) -> None:
        """Have every slot of this kind look for work now."""
        for slot in self.slots:
            if slot.kind == kind:
                slot.ring()

    def request_stop(self) -> None:
        """Have every slot give its work back; does not wait."""
        self._stopping.set()
        for slot in self.slots:
            slot.stop()

    def stop(self) -> None:
        """Stop every child (they save a resume point), give their work back, sign out."""
        self.request_stop()
        deadline = time.monotonic() + self._settings.stop_grace_s + _LAST_WORDS_S
        for slot in self.slots:
            slot.join(max(0.0, deadline - time.monotonic()))
        self._give_up.set()
        ended = _all_end(self.slots)
        if self._heart.is_alive():
            self._heart.join(timeout=_LAST_WORDS_S)
        try:
            with self.context.transaction() as session:
                sign_out(session, self.context.worker_id)
        except SQLAlchemyError as error:
            log.warning("not_signed_out", reason=str(error)[:200])
        self.context.doorbell.close()
        if ended:
            self._incarnations.bury(self._identity)
        self._engine.dispose()
        self._lease_engine.dispose()
        log.info("worker_stopped", worker_id=self.context.worker_id)

    def _make_slots(self) -> list[Slot]:
        """Decide on the slots: one per GPU, or on the CPU where there is none; and those that validate."""
        training = train_places(gpu.discover(), self._settings.train_slots)
        validating = [Place("validate", n) for n in range(self._settings.validate_slots)]
        return [
            Slot(self.context, place, identity=self._identity, give_up=self._give_up)
            for place in [*training, *validating]
        ]

    def _shown(self) -> WorkerSlots:
        """What others are told of the slots; one whose GPU does not work is none."""
        working = [slot.place for slot in self.slots if slot.problem is None]
        training = [place for place in working if place.kind == "train"]
        devices: list[dict[str, Any]] = [_shown_device(place.gpu) for place in training]
        problems = [slot.problem for slot in self.slots if slot.problem is not None]
        return WorkerSlots(
            train=len(training),
            validate=len(working) - len(training),
            devices=devices,
            problem=problems[0] if problems else None,
        )

    def _beat(self) -> None:
        """Sign in, again and again; look whether workers of this host have died meanwhile; clear what jobs left."""
        next_sweep = time.monotonic()
        while True:
            try:
                self._bury_the_dead()
                if time.monotonic() >= next_sweep:
                    sweep(self.context)
                    next_sweep = time.monotonic() + _SWEEP_S
                with transaction(self.context.sessions) as session:
                    sign_in(
                        session,
                        worker_id=self.context.worker_id,
                        host=self.context.host,
                        pid=os.getpid(),
                        slots=self._shown(),
                    )
            except SQLAlchemyError as error:
                log.warning("heartbeat_failed", reason=str(error)[:200])
            except Exception:
                log.exception("heartbeat_failed")
            if self._stopping.wait(_HEARTBEAT_S):
                return

    def _bury_the_dead(self) -> None:
        """Take back at once what workers held whose lock is free: they and their children are gone."""
        for lock in self._incarnations.dead():
            dead_id = self._incarnations.worker_id(lock)
            try:
                with transaction(self.context.sessions) as session:
                    kinds = release_leases_of(
                        session, dead_id, max_attempts=self._settings.max_attempts
                    )
            except BaseException:
                lock.release()  # still there, unlocked: the next beat tries again
                raise
            self._incarnations.bury(lock)
            log.info("former_worker_released", worker_id=dead_id, kinds=sorted(kinds))
            for kind in kinds:
                self.ring(kind)
                self.context.doorbell.kick(kind)


def _shown_device(device: Gpu | None) -> dict[str, Any]:
    if device is None:
        return {"name": "cpu", "memory_bytes": None, "free_memory_bytes": None, "driver": None}
    return {
        "name": device.name,
        "memory_bytes": device.memory_bytes,
        "free_memory_bytes": gpu.free_memory(device),
        "driver": device.driver,
    }


def _all_end(slots: list[Slot]) -> bool:
    """Join every slot, the late ones too."""
    left = [slot for slot in slots if not slot.join(_LAST_WORDS_S)]
    return not left


def train_places(gpus: list[Gpu], wanted: int | None) -> list[Place]:
    """Return the training slots: one per GPU, or one on the CPU where there is none.

    Args:
        gpus: what the machine has.
        wanted: the setting; on GPUs never more than there are, on the CPU as many as asked.
    """
    if not gpus:
        return [Place("train", n) for n in range(1 if wanted is None else wanted)]
    count = len(gpus) if wanted is None else min(wanted, len(gpus))
    return [Place("train", n, gpus[n]) for n in range(count)]
