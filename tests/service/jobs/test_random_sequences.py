"""Random sequences of API calls, worker moves, crashes and lease ends, each step held to what must hold and to the table.

The table of moves in docs/architecture.md is written down here a second time (`_after_…`), from the document, not from the code. A
worker that has crashed keeps trying to write, as one does that was only stopped for longer than its lease.
"""

import random
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import pytest
from sqlalchemy import Engine, func, text, update
from sqlalchemy.orm import Session, sessionmaker

from service.db import transaction
from service.errors import InvalidRequest
from service.events.actions import NewEvent
from service.jobs import actions, wishes
from service.jobs.fingerprint import Fingerprint
from service.jobs.spec import CreateJob
from service.models.catalog import Catalog
from service.queue import finish, lease, story
from service.queue.claim import Claim, claim
from service.queue.fence import Fenced
from service.queue.reap import reap
from service.settings import Settings
from service.tables import DEFAULT_PROJECT, Job
from tests.service.jobs.conftest import CALLER
from tests.service.jobs.invariants import ENDED, Snapshot, check, check_since, look

Kind = Literal["validate", "train"]
Ending = Literal["done", "failed", "stopped", "lost", "reaped"]
WORKERS: tuple[str, ...] = ("a", "b")
MAX_ATTEMPTS = 3
ERROR = {"code": "c", "message": "m", "param": None}
ACTS = {
    "submit": 4,
    "wish": 6,
    "preempt": 2,
    "take": 10,
    "tell": 6,
    "renew": 1,
    "end": 6,
    "crash": 1,
    "lease_ends": 1,
}
"""What happens, and how often."""


def _after_wish(what: str, job: Any) -> tuple[str, str] | None:
    """The status and the wish after a call of the API; None: it is refused."""
    if job.status in ENDED:
        return None
    if what == "cancel":
        return (job.status if job.lease_owner else "cancelled", "cancel")
    if job.desired == "cancel":
        return None
    if what == "pause":
        return ("paused" if job.status == "queued" else job.status, "pause")
    if job.status == "paused":
        return ("queued", "run")
    return (job.status, "run" if job.desired == "pause" else job.desired)


def _after_end(ending: Ending, job: Any) -> str:
    """The status after an attempt's end."""
    trains = job.status == "running"
    if ending == "done" and trains:
        return "succeeded"  # it was done before any wish
    if job.desired == "cancel":
        return "cancelled"
    if ending == "failed":
        return "failed"
    if ending in ("lost", "reaped") and job.lost_attempts + 1 >= MAX_ATTEMPTS:
        return "failed"
    if not trains and ending != "done":
        return "validating_files"
    return "paused" if job.desired == "pause" else "queued"


class JobsWalk:
    """One random walk from an empty queue; the seed says which."""

    def __init__(
        self,
        engine: Engine,
        sessions: sessionmaker[Session],
        settings: Settings,
        catalog: Catalog,
        file_id: str,
        *,
        seed: int,
    ) -> None:
        self.engine = engine
        self.sessions = sessions
        self.settings = settings
        self.catalog = catalog
        self.file_id = file_id
        self.chance = random.Random(seed)
        with self.engine.begin() as connection:
            connection.execute(text("TRUNCATE jobs CASCADE"))
        self.job_of: dict[str, str] = {}  # by the key of its submission
        self.claims: list[Claim] = []  # every one that was ever given, to whomever
        self.hands: dict[str, Claim | None] = dict.fromkeys(WORKERS)
        self.starts = dict.fromkeys(WORKERS, 1)
        self.live: dict[str, int] = {}  # which attempt has the job
        self.told: dict[tuple[str, int], set[int]] = {}
        self.seen = look(self.engine)

    # The API.

    def submit(self) -> None:
        key = str(self.chance.randrange(len(self.job_of) + 1))
        body = CreateJob(model="tiny", training_file=self.file_id, seed=int(key))
        with transaction(self.sessions) as session:
            job = actions.create(
                session,
                self.catalog,
                self.settings,
                CALLER,
                body,
                Fingerprint.of(body, idempotency_key=key),
            )
        assert self.job_of.setdefault(key, job.id) == job.id

    def wish(self) -> None:
        job_id = self._job()
        what = self.chance.choices(["pause", "resume", "cancel"], [5, 4, 1])[0]
        expected = _after_wish(what, self.seen.jobs[job_id])
        try:
            with transaction(self.sessions) as session:
                job = getattr(wishes, what)(session, DEFAULT_PROJECT, job_id)
        except InvalidRequest:
            assert expected is None
        else:
            assert (job.status, job.desired) == expected

    def preempt(self) -> None:
        job_id = self._job()
        was = self.seen.jobs[job_id]
        with transaction(self.sessions) as session:
            asked = wishes.preempt(session, DEFAULT_PROJECT, job_id)
        assert asked == ((was.status, was.desired) == ("running", "run"))

    # Workers.

    def take(self) -> None:
        name = self.chance.choice(WORKERS)
        kinds: list[Kind] = ["validate", "train"]
        if self.hands[name] is None:
            self.hands[name] = self._claim(name, self.chance.choice(kinds))

    def _claim(self, name: str, kind: Kind) -> Claim | None:
        status = "validating_files" if kind == "validate" else "queued"
        waiting = {
            job.id
            for job in self.seen.jobs.values()
            if job.status == status and not job.lease_owner
        }
        with transaction(self.sessions) as session:
            taken = claim(
                session, kind=kind, worker_id=self._worker(name), host="here", lease_s=600
            )
        if taken is None:
            assert not waiting
            return None
        assert taken.job.id in waiting
        self.live[taken.job.id] = taken.fence.attempt_no
        self.claims.append(taken)
        return taken

    def tell(self) -> None:
        """Whoever was ever given a job tells lines of it, some of them again."""
        run = self._writer()
        first = self.chance.randrange(1, 5)
        lines = range(first, first + self.chance.randrange(1, 4))
        events = [NewEvent(f"line {n}", line_no=n) for n in lines]
        if self._write(run, lambda session: story.tell(session, run.fence, events)):
            self.told.setdefault(self._attempt(run), set()).update(lines)

    def renew(self) -> None:
        run = self._writer()
        self._write(run, lambda session: lease.renew(session, run.fence, 600))

    def end(self) -> None:
        """Whoever was ever given a job ends it, perhaps twice: the first commit's answer was lost."""
        run = self._writer()
        endings: list[Ending] = ["done", "failed", "stopped", "lost"]
        ending = self.chance.choices(endings, [4, 1, 4, 2])[0]
        job = self.seen.jobs[run.job.id]
        if self._write(run, lambda session: _end(session, run, ending)):
            expected = _after_end(ending, job)
            assert look(self.engine).jobs[job.id].status == expected
            del self.live[job.id]
            if self.chance.random() < 0.5:
                self._write(run, lambda session: _end(session, run, ending))
        self._let_go(run)

    def crash(self) -> None:
        """A worker dies, or is stopped; the next one of its host notices by its lock, or only its lease's end tells."""
        name = self.chance.choice(WORKERS)
        if self.chance.random() < 0.5:
            held = [job for job in self.seen.jobs.values() if job.lease_owner == self._worker(name)]
            with transaction(self.sessions) as session:
                lease.release_leases_of(session, self._worker(name), max_attempts=MAX_ATTEMPTS)
            self._taken_back(held)
        self.hands[name] = None
        self.starts[name] += 1

    def lease_ends(self) -> None:
        if not self.live:
            return
        job_id = self.chance.choice(list(self.live))
        job = self.seen.jobs[job_id]
        with transaction(self.sessions) as session:
            ended = func.now() - timedelta(seconds=60)
            session.execute(update(Job).where(Job.id == job_id).values(lease_until=ended))
        with transaction(self.sessions) as session:
            reap(session, self.settings)
        self._taken_back([job])

    # What must hold.

    def all_holds(self) -> None:
        now = look(self.engine)
        check(now, max_attempts=MAX_ATTEMPTS)
        check_since(self.seen, now)
        assert {j.id: j.attempt_no for j in now.jobs.values() if j.lease_owner} == self.live
        assert _lines(now) == {key: lines for key, lines in self.told.items() if lines}
        self.seen = now

    def end_all(self) -> None:
        """Every job ends once everything works."""
        for run in self.claims:
            self._write(run, lambda session, run=run: _end(session, run, "done"))
        self.live.clear()
        for job_id in self.job_of.values():
            if look(self.engine).jobs[job_id].status not in ENDED:
                with transaction(self.sessions) as session:
                    wishes.resume(session, DEFAULT_PROJECT, job_id)
        for kind in ("validate", "train"):
            self.seen = look(self.engine)
            while taken := self._claim("a", kind):
                with transaction(self.sessions) as session:
                    _end(session, taken, "done")
                self.seen = look(self.engine)
        self.live.clear()
        self.all_holds()
        assert {job.status for job in self.seen.jobs.values()} <= ENDED

    def go(self, steps: int) -> None:
        """Take random steps, each looked at, and end."""
        self.submit()
        self.all_holds()
        self.hands["a"] = self._claim("a", "validate")
        self.all_holds()
        taken: list[str] = []
        for act in self.chance.choices(list(ACTS), list(ACTS.values()), k=steps):
            taken.append(act)
            try:
                getattr(self, act)()
                self.all_holds()
            except BaseException as error:
                error.add_note(f"the last steps: {', '.join(taken[-15:])}")
                raise
        self.end_all()

    # How a step is made.

    def _write(self, run: Claim, act: Callable[[Session], object]) -> bool:
        """Write as the attempt; False: it was refused, as it must be once the job is another's, and then alone."""
        is_live = self.live.get(run.job.id) == run.fence.attempt_no
        try:
            with transaction(self.sessions) as session:
                act(session)
        except Fenced:
            assert not is_live
            return False
        assert is_live
        return True

    def _taken_back(self, jobs: list[Any]) -> None:
        now = look(self.engine).jobs
        for job in jobs:
            assert now[job.id].status == _after_end("reaped", job)
            del self.live[job.id]

    def _writer(self) -> Claim:
        """One who was given a job: of four times three one who still works for all that it knows, where there is any."""
        at_work = [run for run in self.hands.values() if run is not None]
        return self.chance.choice(
            at_work if at_work and self.chance.random() < 0.75 else self.claims
        )

    def _let_go(self, run: Claim) -> None:
        self.hands = {name: None if held is run else held for name, held in self.hands.items()}

    def _job(self) -> str:
        return self.chance.choice(list(self.job_of.values()))

    def _worker(self, name: str) -> str:
        return f"worker_{name}{self.starts[name]}"

    def _attempt(self, run: Claim) -> tuple[str, int]:
        return run.job.id, run.fence.attempt_no


def _lines(snapshot: Snapshot) -> dict[tuple[str, int], set[int]]:
    found: dict[tuple[str, int], set[int]] = {}
    for job_id, events in snapshot.events.items():
        for event in events:
            if event.line_no is not None:
                found.setdefault((job_id, event.attempt_no), set()).add(event.line_no)
    return found


def _end(session: Session, run: Claim, ending: Ending) -> None:
    """End an attempt as a worker does."""
    fence = run.fence
    if ending == "done" and run.kind == "validate":
        finish.validated(session, fence, report={}, hyperparameters={})
    elif ending == "done":
        finish.succeeded(
            session,
            fence,
            fine_tuned_model=f"ft:{fence.job_id}",
            adapter_step=1,
            trained_tokens=1,
            result_file="f",
            detail={},
        )
    elif ending == "failed":
        finish.failed(session, fence, ERROR)
    else:
        lost = ending == "lost"
        finish.give_back(session, fence, lost=lost, reason="x", max_attempts=MAX_ATTEMPTS)


@pytest.fixture
def walk(
    engine: Engine,
    sessions: sessionmaker[Session],
    settings: Settings,
    catalog: Catalog,
    file_id: str,
) -> Callable[..., None]:
    """Take a walk over this test's database, where a lease is over as soon as its end is past."""
    short = settings.model_copy(update={"lease_s": 0.01, "max_attempts": MAX_ATTEMPTS})

    def go(*, seed: int, steps: int) -> None:
        JobsWalk(engine, sessions, short, catalog, file_id, seed=seed).go(steps)

    return go


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_in_whatever_order_the_queue_holds(
    walk: Callable[..., None], seed: int
) -> None:
    walk(seed=seed, steps=100)


@pytest.mark.slow
def test_the_long_form(walk: Callable[..., None]) -> None:
    for seed in range(100, 250):
        walk(seed=seed, steps=100)
