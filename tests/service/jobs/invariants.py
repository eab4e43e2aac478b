"""What must hold of the jobs at every moment, read in one snapshot of the database, by SQL of its own."""

from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

from sqlalchemy import Engine, text

ENDED = {"succeeded", "failed", "cancelled"}
HELD = {"validating_files", "running"}

_JOBS = """
    SELECT id, status, desired, attempt_no, lost_attempts, lease_owner, seq, finished_at IS NOT NULL AS finished,
           paused_at IS NOT NULL AS is_paused
    FROM jobs"""
_ATTEMPTS = "SELECT job_id, attempt_no, kind, worker_id, outcome, ended_at FROM attempts ORDER BY job_id, attempt_no"
_EVENTS = "SELECT job_id, seq, id, attempt_no, line_no FROM events ORDER BY job_id, seq"
_OUTBOX = "SELECT job_id, type FROM outbox"
_SUBMISSIONS = "SELECT job_id, idempotency_key FROM submissions"

Row = Any


@dataclass(frozen=True)
class Snapshot:
    """All that one transaction saw: rows by job, in order."""

    jobs: dict[str, Row]
    attempts: dict[str, list[Row]]
    events: dict[str, list[Row]]
    outbox: dict[str, list[str]]
    submissions: list[Row]


def look(engine: Engine) -> Snapshot:
    """Read everything as it stands at one moment."""
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        jobs = {row.id: row for row in connection.execute(text(_JOBS))}
        attempts: dict[str, list[Row]] = {job_id: [] for job_id in jobs}
        events: dict[str, list[Row]] = {job_id: [] for job_id in jobs}
        outbox: dict[str, list[str]] = {job_id: [] for job_id in jobs}
        for row in connection.execute(text(_ATTEMPTS)):
            attempts[row.job_id].append(row)
        for row in connection.execute(text(_EVENTS)):
            events[row.job_id].append(row)
        for row in connection.execute(text(_OUTBOX)):
            outbox[row.job_id].append(row.type)
        submissions = list(connection.execute(text(_SUBMISSIONS)))
    return Snapshot(jobs, attempts, events, outbox, submissions)


def check(now: Snapshot, *, max_attempts: int) -> None:
    """Assert what holds at every moment."""
    for job_id, job in now.jobs.items():
        _check_one_live_attempt(job, now.attempts[job_id])
        _check_waits_or_ends(job, now.outbox[job_id])
        _check_losses(job, now.attempts[job_id], max_attempts)
        _check_story(job, now.events[job_id])
    keys = [row.idempotency_key for row in now.submissions]
    assert len(keys) == len(set(keys)), "two jobs for one submission"
    assert sorted(row.job_id for row in now.submissions) == sorted(now.jobs)


def _check_one_live_attempt(job: Row, attempts: list[Row]) -> None:
    assert [attempt.attempt_no for attempt in attempts] == list(range(1, job.attempt_no + 1))
    live = [attempt for attempt in attempts if attempt.ended_at is None]
    assert [attempt.outcome for attempt in live] == [None] * len(live)
    if job.lease_owner is None:
        assert live == [], f"{job.id} is nobody's, and has a live attempt"
    else:
        # Held: by its newest attempt alone, of the worker that has the lease.
        assert [(a.attempt_no, a.worker_id) for a in live] == [(job.attempt_no, job.lease_owner)]
        assert job.status in HELD, f"{job.id} holds a worker and is {job.status}"
        assert (live[0].kind == "train") == (job.status == "running")


def _check_waits_or_ends(job: Row, outbox: list[str]) -> None:
    ended = job.status in ENDED
    assert job.finished == ended
    assert outbox == ([f"fine_tuning.job.{job.status}"] if ended else [])
    assert job.is_paused == (job.status == "paused")
    if job.status == "running":
        assert job.lease_owner is not None, f"{job.id} runs nowhere"
    if not ended and job.lease_owner is None:
        # Whatever nobody works on can be claimed, or waits for its user: no wish is left that nobody will fulfil.
        allowed = {
            "validating_files": {"run", "pause"},
            "queued": {"run"},
            "paused": {"pause"},
        }
        assert job.desired in allowed[job.status], (job.status, job.desired)


def _check_losses(job: Row, attempts: list[Row], max_attempts: int) -> None:
    assert 0 <= job.lost_attempts <= max_attempts
    if job.status in ENDED:
        return
    kind = "validate" if job.status == "validating_files" else "train"
    over = [attempt for attempt in attempts if attempt.ended_at is not None]
    in_a_row = takewhile(lambda a: (a.kind, a.outcome) == (kind, "lost"), reversed(over))
    assert job.lost_attempts == len(list(in_a_row)) < max_attempts


def _check_story(job: Row, events: list[Row]) -> None:
    assert [event.seq for event in events] == list(range(1, job.seq + 1)), f"gaps in {job.id}"
    assert len({event.id for event in events}) == len(events)
    lines = [(event.attempt_no, event.line_no) for event in events if event.line_no is not None]
    assert len(set(lines)) == len(lines)
    # Nobody writes for an attempt once a later one has begun.
    for one, next_ in pairwise(lines):
        assert one[0] <= next_[0], f"attempt {next_[0]} of {job.id} told a line after {one[0]} had"


def check_since(before: Snapshot, now: Snapshot) -> None:
    """Assert what holds between two moments: ends are final, stories only grow at their end, numbers only rise."""
    assert set(before.jobs) <= set(now.jobs), "a job is gone"
    for job_id, was in before.jobs.items():
        job = now.jobs[job_id]
        assert job.attempt_no >= was.attempt_no
        told = before.events[job_id]
        assert now.events[job_id][: len(told)] == told, f"{job_id}'s story has changed"
        if was.status in ENDED:
            assert tuple(job) == tuple(was), f"{job_id} had ended, and has changed"
