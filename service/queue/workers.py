"""The workers' own rows: who is there, with which slots and devices, and when last heard of."""

from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy.orm import Session

from service.queue import workers_repository


@dataclass(frozen=True)
class WorkerSlots:
    """What a worker can do at once."""

    train: int
    validate: int
    devices: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """One per training slot: {"name", "memory_bytes", "free_memory_bytes", "driver"}; all but the name are None for a CPU."""
    problem: str | None = None
    """Why the worker takes no training although it has a GPU: one sentence, or None."""


def sign_in(session: Session, *, worker_id: str, host: str, pid: int, slots: WorkerSlots) -> None:
    """Say that the worker is there; said again, it is the heartbeat."""
    row = {"id": worker_id, "host": host, "pid": pid, "slots": asdict(slots)}
    workers_repository.save_worker(session, row)


def sign_out(session: Session, worker_id: str) -> None:
    """Say that the worker has ended in good order."""
    workers_repository.stop_worker(session, worker_id)


def is_alive(session: Session, host: str, *, within_s: float) -> bool:
    """Say whether a worker of this host has signed in within the last `within_s` seconds."""
    return workers_repository.worker_was_seen(session, host, within_s)
