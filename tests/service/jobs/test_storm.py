"""Many threads at once over one PostgreSQL: calls of the API, workers that stall, crash and come back, a reaper, and one that looks.

Random sequences (`test_random_sequences`) take one step at a time; here the steps overlap, so what is held to is what holds at every
moment and what each writer was told: what was accepted is there once, what was refused left nothing.
"""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from service.db import transaction
from service.errors import InvalidRequest
from service.events.actions import NewEvent
from service.jobs import wishes
from service.queue import finish, lease, story
from service.queue.claim import Claim, claim
from service.queue.fence import Fenced
from service.queue.reap import reap
from service.settings import Settings
from service.tables import DEFAULT_PROJECT
from tests.service.jobs.conftest import Create
from tests.service.jobs.invariants import ENDED, check, check_since, look

Sessions = sessionmaker[Session]
Kind = Literal["validate", "train"]
LEASE_S = 0.15
MAX_ATTEMPTS = 1_000  # no job fails for being lost: stalls are the rule here


@dataclass
class Ledger:
    """What the threads were told. Appending to a list is atomic."""

    keys: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])  # key → job
    lines: list[tuple[str, int, int]] = field(default_factory=list[tuple[str, int, int]])
    ends: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    refused: list[str] = field(default_factory=list[str])
    failures: list[BaseException] = field(default_factory=list[BaseException])


class Storm:
    """The threads; each draws from its own seed."""

    def __init__(
        self, sessions: Sessions, settings: Settings, engine: Engine, create: Create
    ) -> None:
        self.sessions = sessions
        self.settings = settings
        self.engine = engine
        self.create = create
        self.ledger = Ledger()
        self.over = threading.Event()

    def rage(self, seed: int, duration_s: float) -> None:
        """Run all threads for so long; raise what any of them met."""
        acts: list[Callable[[random.Random], None]] = [
            *[self._worker] * 4,
            *[self._user] * 2,
            self._reaper,
            self._watcher,
        ]
        threads = [
            threading.Thread(target=self._keep, args=[act, random.Random(seed * 100 + n)])
            for n, act in enumerate(acts)
        ]
        for thread in threads:
            thread.start()
        self.over.wait(duration_s)
        self.over.set()
        for thread in threads:
            thread.join()
        if self.ledger.failures:
            raise self.ledger.failures[0]

    def calm(self) -> None:
        """Take everything back, and let one worker end it."""
        deadline = time.monotonic() + 20
        while any(job.lease_owner for job in look(self.engine).jobs.values()):
            assert time.monotonic() < deadline, "a lease does not end"
            self._reap()
            time.sleep(LEASE_S / 4)
        for job in look(self.engine).jobs.values():
            if job.status not in ENDED:
                with transaction(self.sessions) as session:
                    wishes.resume(session, DEFAULT_PROJECT, job.id)
        kinds: tuple[Kind, ...] = ("validate", "train")
        for kind in kinds:
            while (run := self._claim(kind, "worker_last")) is not None:
                self._end(run, "done")

    def _keep(self, act: Callable[[random.Random], None], chance: random.Random) -> None:
        try:
            while not self.over.is_set():
                act(chance)
        except BaseException as error:  # noqa: BLE001  (a thread's edge: the test raises it)
            self.ledger.failures.append(error)
            self.over.set()

    def _user(self, chance: random.Random) -> None:
        key = (
            f"key-{int(time.monotonic() / 0.08)}"  # the same one at the same moment for all of them
        )
        if chance.random() < 0.3:
            self.ledger.keys.append((key, self.create(key=key, seed=1)))
            return
        if not self.ledger.keys:
            return
        _, job_id = chance.choice(self.ledger.keys)
        what = chance.choice([wishes.pause, wishes.resume, wishes.resume, wishes.preempt])
        if chance.random() < 0.05:
            what = wishes.cancel
        try:
            with transaction(self.sessions) as session:
                what(session, DEFAULT_PROJECT, job_id)
        except InvalidRequest:
            self.ledger.refused.append("wish")

    def _worker(self, chance: random.Random) -> None:
        """Claim, tell some lines, perhaps stall until the job is another's, perhaps vanish, else end it."""
        kinds: list[Kind] = ["validate", "train"]
        run = self._claim(chance.choice(kinds), f"worker_{chance.randrange(10**9)}")
        if run is None:
            time.sleep(0.002)
            return
        for line in range(1, chance.randrange(2, 5)):
            if chance.random() < 0.1:
                time.sleep(
                    LEASE_S * 1.6
                )  # stopped for longer than its lease; it goes on as if nothing were
            if chance.random() < 0.3:
                self._try(run, lambda session: lease.renew(session, run.fence, LEASE_S))
            event = NewEvent(f"line {line}", line_no=line)
            if self._try(run, lambda s, e=event: story.tell(s, run.fence, [e])):
                self.ledger.lines.append((*_attempt(run), line))
        if chance.random() < 0.1:
            return  # killed: nobody says so
        self._end(run, chance.choice(["done", "done", "stopped", "stopped", "lost", "failed"]))

    def _end(self, run: Claim, ending: str) -> None:
        def write(session: Session) -> object:
            fence = run.fence
            if ending == "done" and run.kind == "validate":
                return finish.validated(session, fence, report={}, hyperparameters={})
            if ending == "done":
                more: dict[str, Any] = {"adapter_step": 1, "trained_tokens": 1, "detail": {}}
                name = f"ft:{fence.job_id}"
                return finish.succeeded(
                    session, fence, fine_tuned_model=name, result_file="f", **more
                )
            if ending == "failed":
                return finish.failed(session, fence, {"code": "c", "message": "m", "param": None})
            lost = ending == "lost"
            return finish.give_back(
                session, fence, lost=lost, reason="x", max_attempts=MAX_ATTEMPTS
            )

        if self._try(run, write):
            self.ledger.ends.append(_attempt(run))

    def _try(self, run: Claim, write: Callable[[Session], object]) -> bool:
        """Write as the attempt; False: it was refused."""
        try:
            with transaction(self.sessions) as session:
                write(session)
        except Fenced:
            self.ledger.refused.append(run.fence.job_id)
            return False
        return True

    def _claim(self, kind: Kind, worker_id: str) -> Claim | None:
        with transaction(self.sessions) as session:
            return claim(session, kind=kind, worker_id=worker_id, host="here", lease_s=LEASE_S)

    def _reaper(self, chance: random.Random) -> None:
        self._reap()
        time.sleep(chance.random() * 0.02)

    def _reap(self) -> None:
        with transaction(self.sessions) as session:
            reap(session, self.settings)

    def _watcher(self, chance: random.Random) -> None:
        before = look(self.engine)
        time.sleep(chance.random() * 0.02)
        now = look(self.engine)
        check(now, max_attempts=MAX_ATTEMPTS)
        check_since(before, now)


def _attempt(run: Claim) -> tuple[str, int]:
    return run.fence.job_id, run.fence.attempt_no


@pytest.fixture
def storm(engine: Engine, sessions: Sessions, settings: Settings, create: Create) -> Storm:
    short = settings.model_copy(update={"lease_s": LEASE_S, "max_attempts": MAX_ATTEMPTS})
    return Storm(sessions, short, engine, create)


def hold(storm: Storm, *, seed: int, duration_s: float) -> None:
    storm.rage(seed, duration_s)
    storm.calm()

    ledger, end = storm.ledger, look(storm.engine)
    check(end, max_attempts=MAX_ATTEMPTS)
    assert {job.status for job in end.jobs.values()} <= ENDED
    # One job per submission, however often and by whom it was sent.
    assert len(set(ledger.keys)) == len({key for key, _ in ledger.keys}) == len(end.jobs)
    # What a writer was told is there, once; what it was refused is not.
    told = [
        (job_id, event.attempt_no, event.line_no)
        for job_id, events in end.events.items()
        for event in events
        if event.line_no is not None
    ]
    assert sorted(told) == sorted(ledger.lines)
    lost_by_the_reaper = {
        (a.job_id, a.attempt_no)
        for attempts in end.attempts.values()
        for a in attempts
        if (a.job_id, a.attempt_no) not in set(ledger.ends)
    }
    assert len(ledger.ends) == len(set(ledger.ends)), "an attempt has ended twice"
    assert {
        a.outcome
        for attempts in end.attempts.values()
        for a in attempts
        if (a.job_id, a.attempt_no) in lost_by_the_reaper
    } <= {"lost"}
    assert ledger.refused, "nobody was refused: there was no storm"


def test_a_short_storm(storm: Storm) -> None:
    hold(storm, seed=1, duration_s=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 5))
def test_a_long_storm(storm: Storm, seed: int) -> None:
    hold(storm, seed=seed, duration_s=30)
