"""The faults. Each looks for a victim and hits it, or finds none just now and does nothing.

A fault says which jobs it took their process from: these must be claimed again. All other jobs only have to go on.
"""

import os
import random
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import redis

from operations.embedded import valkey
from tests.chaos.service import Rows, Service

_LIVE = """
    SELECT a.job_id, a.kind, a.pid, w.pid AS worker_pid FROM attempts a JOIN workers w ON w.id = a.worker_id
    WHERE a.ended_at IS NULL AND a.pid IS NOT NULL ORDER BY a.started_at"""


@dataclass(frozen=True)
class Hit:
    """A fault that took place."""

    what: str
    jobs: list[str] = field(default_factory=list[str])  # whose process is gone


Fault = Callable[[Service, random.Random], Hit | None]


def kill_worker(service: Service, rng: random.Random) -> Hit | None:
    """kill -9 of the parent of a worker that trains; its children go with it."""
    live = _live(service)
    busy = sorted({row.worker_pid for row in live if row.kind == "train"})
    if not busy:
        return None
    pid = rng.choice(busy)
    taken = [row.job_id for row in live if row.worker_pid == pid]
    return Hit(f"worker {pid}", taken) if _kill(service, pid) else None


def kill_training_child(service: Service, rng: random.Random) -> Hit | None:
    """kill -9 of a process that trains."""
    return _kill_child(service, rng, "train")


def kill_validating_child(service: Service, rng: random.Random) -> Hit | None:
    """kill -9 of a process that validates."""
    return _kill_child(service, rng, "validate")


def empty_valkey(service: Service, rng: random.Random) -> Hit | None:
    """FLUSHALL."""
    url = valkey.running_url(service.data_dir)
    if url is None:
        return None
    with suppress(redis.RedisError), redis.Redis(unix_socket_path=url.partition("//")[2]) as client:
        client.flushall()
        return Hit("all keys")
    return None


def restart_postgres(service: Service, rng: random.Random) -> Hit | None:
    """Its fast shutdown, which disconnects everybody; the launcher starts it again."""
    return _signal_server(service, "postgres", signal.SIGINT)


def kill_api(service: Service, rng: random.Random) -> Hit | None:
    """kill -9 of the API, whatever it is doing."""
    return _signal_server(service, "api", signal.SIGKILL)


FAULTS: dict[str, Fault] = {
    "kill -9 of a worker": kill_worker,
    "kill -9 of a training child": kill_training_child,
    "Valkey: FLUSHALL": empty_valkey,
    "PostgreSQL: fast restart": restart_postgres,
    "kill -9 of a validating child": kill_validating_child,
    "kill -9 of the API": kill_api,
}
SHORT = list(FAULTS)[:4]


def _live(service: Service) -> Rows:
    """Attempts with a process, as far as the database knows and answers."""
    return [row for row in service.query(_LIVE) or [] if service.is_ours(row.pid)]


def _kill_child(service: Service, rng: random.Random, kind: str) -> Hit | None:
    live = [row for row in _live(service) if row.kind == kind]
    if not live:
        return None
    victim = rng.choice(live)
    return Hit(f"child {victim.pid}", [victim.job_id]) if _kill(service, victim.pid) else None


def _kill(service: Service, pid: int) -> bool:
    """Kill a process of this run; False: it is gone already."""
    if not service.is_ours(pid):
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def _signal_server(service: Service, name: str, number: signal.Signals) -> Hit | None:
    process = service.server(name)
    if process is None:
        return None
    process.send_signal(number)
    return Hit(f"{name} {process.pid}")
