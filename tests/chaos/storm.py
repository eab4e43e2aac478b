"""One run: jobs come in from several scripts, faults fall at moments that a seed draws, and at the end everything is examined."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.checks import Findings, examine, held_locks
from tests.chaos.faults import FAULTS, Hit
from tests.chaos.recovery import Jobs, Recovery, look
from tests.chaos.service import NotInTime, Service
from tests.chaos.users import Users

_VICTIM_S = 60.0
_RECOVERY_S = 90.0
_ALL_END_S = 400.0
_LONGEST_PAUSE_S = 3.0
_SUBMITTING_S = 3.0
_LOCKS_OF_THE_KILLED_S = 15.0
_LIVE = "SELECT 1 FROM jobs WHERE status NOT IN ('succeeded', 'failed', 'cancelled') LIMIT 1"


@dataclass(frozen=True)
class Strike:
    """A fault that fell, and how long the service took to be itself again."""

    fault: str
    what: str
    jobs_hit: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """Of one run."""

    seed: int
    submissions: int
    strikes: Sequence[Strike]
    findings: Findings
    seconds: float


def run(
    folder: Path,
    model: Path,
    *,
    seed: int,
    jobs: int,
    faults: Sequence[str],
    say: Callable[[str], None],
) -> Outcome:
    """Run `jobs` submissions under `faults` (keys of `FAULTS`), in this order, and examine what is left.

    Raises:
        NotInTime: the service did not recover, or a job did not end.
    """
    began = time.monotonic()
    service = Service(folder, model, say=say)
    try:
        users = Users(
            service.url, service.key, count=jobs, seed=seed, longest_pause_s=_SUBMITTING_S
        )
        try:
            strikes = _strike(service, random.Random(seed), faults)
            _let_all_end(service, users)
        finally:
            users.close()
        service.stop_workers()
        findings = examine(service.engine, service.data_dir, count=jobs, told=users.told())
    finally:
        service.stop()
        left = service.left_over()
        service.kill_left_over()
    findings.broken += [f"left over: {process}" for process in left]
    findings.broken += held_locks(service.data_dir)
    return Outcome(seed, jobs, strikes, findings, time.monotonic() - began)


def _strike(service: Service, rng: random.Random, faults: Sequence[str]) -> list[Strike]:
    """Let the faults fall one after the other, each when the service is itself again after the one before."""
    service.wait_for(service.is_whole, timeout_s=_RECOVERY_S, why="the workers have not signed in")
    strikes: list[Strike] = []
    for name in faults:
        service.pause(rng.uniform(0, _LONGEST_PAUSE_S))
        before, hit = _hit(service, rng, name)
        began = time.monotonic()
        service.say(f"{name}: {hit.what}, with {len(hit.jobs)} jobs")
        recovery = Recovery(service, before, hit)
        service.wait_for(
            recovery.is_over, timeout_s=_RECOVERY_S, why=f"recovery from {name} ({hit.what})"
        )
        strikes.append(Strike(name, hit.what, len(hit.jobs), time.monotonic() - began))
        service.say(f"  itself again after {strikes[-1].seconds:.1f} s")
    return strikes


def _hit(service: Service, rng: random.Random, name: str) -> tuple[Jobs, Hit]:
    """Wait for a victim and hit it; return how the jobs stood just before."""
    deadline = time.monotonic() + _VICTIM_S
    while time.monotonic() < deadline:
        before = look(service)
        hit = FAULTS[name](service, rng) if before is not None else None
        if before is not None and hit is not None:
            return before, hit
        service.pause(0.1)
    raise NotInTime(f"{name}: there was no victim within {_VICTIM_S:.0f} s")


def _let_all_end(service: Service, users: Users) -> None:
    service.wait_for(users.are_done, timeout_s=_ALL_END_S, why="the scripts are not done")
    service.wait_for(
        lambda: service.query(_LIVE) == [], timeout_s=_ALL_END_S, why="some jobs do not end"
    )
    # Workers of a host look every ten seconds for those that died; until then a killed one's lock lies there.
    service.wait_for(
        lambda: (
            len(list((service.data_dir / "workers").rglob("*.lock"))) <= len(service.worker_pids())
        ),
        timeout_s=_LOCKS_OF_THE_KILLED_S,
        why="nobody buries the killed workers",
    )
