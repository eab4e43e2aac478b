"""What must hold when it is over, read from the database, the blobs and the attempts' folders by code of its own.

`lost` and `doubled` are sentences, one for each thing that is missing or there twice; `broken` are other rules that do not hold.
A blob without a row is not an error: uploads that were cut off and lost attempts' adapters stay (docs/known-gaps.md).
"""

import fcntl
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sqlalchemy import Connection, Engine, text

from tests.chaos.service import MAX_ATTEMPTS
from tests.chaos.users import STEPS, Submission
from tests.service.jobs import invariants


@dataclass
class Findings:
    """What came of one run."""

    lost: list[str] = field(default_factory=list[str])
    doubled: list[str] = field(default_factory=list[str])
    broken: list[str] = field(default_factory=list[str])
    unreferenced_blobs: int = 0

    def all(self) -> list[str]:
        """Everything that must not be."""
        return [*self.lost, *self.doubled, *self.broken]

    def expect_once(self, what: str, count: int) -> None:
        """Note what is not there exactly once."""
        if count == 0:
            self.lost.append(f"{what}: lost")
        elif count > 1:
            self.doubled.append(f"{what}: {count} times")


def examine(engine: Engine, data_dir: Path, *, count: int, told: Sequence[Submission]) -> Findings:
    """Look at everything that `count` submissions left, once all jobs have ended and no worker runs."""
    findings = Findings()
    _check_invariants(engine, findings)
    with engine.connect() as connection:
        jobs = list(connection.execute(text("SELECT * FROM jobs")))
        _check_submissions(jobs, count, told, findings)
        for job in jobs:
            _check_end(connection, job, findings)
            _check_steps(connection, job, findings)
            _check_lines(connection, job, data_dir / "attempts" / job.id, findings)
        _check_blobs(connection, data_dir / "blobs", findings)
    return findings


def held_locks(data_dir: Path) -> list[str]:
    """The lock files below `data_dir` that somebody still holds, and the locks of workers that nobody buried."""
    held: list[str] = []
    for path in (*data_dir.rglob("lock"), *data_dir.rglob("*.lock")):
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(f"{path.relative_to(data_dir)} is held")
                continue
        if path.is_relative_to(data_dir / "workers"):
            held.append(f"{path.relative_to(data_dir)} was left")
    return held


def _check_invariants(engine: Engine, findings: Findings) -> None:
    now = invariants.look(engine)
    # What came without a key is told apart by its body; the rule about keys is about those that have one.
    submissions = [
        SimpleNamespace(job_id=row.job_id, idempotency_key=row.idempotency_key or row.job_id)
        for row in now.submissions
    ]
    try:
        invariants.check(replace(now, submissions=submissions), max_attempts=MAX_ATTEMPTS)
    except AssertionError as error:
        findings.broken.append(str(error))


def _check_submissions(
    jobs: Sequence[Any], count: int, told: Sequence[Submission], findings: Findings
) -> None:
    made = Counter(int(job.metadata["submission"]) for job in jobs)
    for number in range(count):
        findings.expect_once(f"the job of submission {number}", made[number])
    ids = {job.id: int(job.metadata["submission"]) for job in jobs}
    for submission in told:
        if ids.get(submission.job_id) != submission.number:
            findings.lost.append(f"{submission.job_id}, which submission {submission.number} got")
    names = Counter(job.fine_tuned_model for job in jobs)
    findings.doubled += [f"the model {name}: {n} times" for name, n in names.items() if n > 1]


def _check_end(connection: Connection, job: Any, findings: Findings) -> None:
    if job.status != "succeeded":
        findings.lost.append(f"{job.id} is {job.status}: {job.error}")
        return
    attempts = _rows(connection, "SELECT * FROM attempts WHERE job_id = :id", job.id)
    won = [a.attempt_no for a in attempts if (a.kind, a.outcome) == ("train", "succeeded")]
    findings.expect_once(f"the end of {job.id}", len(won))
    adapters = _rows(connection, "SELECT * FROM adapters WHERE job_id = :id", job.id)
    offered = [a for a in adapters if a.attempt_no in won and a.step_number == job.adapter_step]
    findings.expect_once(f"the adapter of {job.id}", len(offered))
    checkpoints = _rows(connection, "SELECT * FROM checkpoints WHERE job_id = :id", job.id)
    steps = Counter(checkpoint.step_number for checkpoint in checkpoints)
    findings.doubled += [f"checkpoint {s} of {job.id}" for s, n in steps.items() if n > 1]


def _check_steps(connection: Connection, job: Any, findings: Findings) -> None:
    """Every step was told, and by no attempt twice."""
    sql = "SELECT attempt_no, data->>'step' AS step FROM events WHERE job_id = :id AND type = 'metrics'"
    told = Counter((row.attempt_no, int(row.step)) for row in _rows(connection, sql, job.id))
    findings.doubled += [f"{what} of {job.id} (attempt, step)" for what, n in told.items() if n > 1]
    missing = set(range(1, STEPS + 1)) - {step for _, step in told}
    findings.lost += [f"step {step} of {job.id}" for step in sorted(missing)]


def _check_lines(connection: Connection, job: Any, folder: Path, findings: Findings) -> None:
    """What the children of training attempts wrote is in the story, line by line, but for resume points, which are not told."""
    sql = "SELECT attempt_no, line_no FROM events WHERE job_id = :id AND line_no IS NOT NULL"
    told = Counter((row.attempt_no, row.line_no) for row in _rows(connection, sql, job.id))
    trained = "SELECT attempt_no FROM attempts WHERE job_id = :id AND kind = 'train'"
    for (attempt_no,) in _rows(connection, trained, job.id):
        for n in _lines(folder / str(attempt_no) / "events.jsonl"):
            findings.expect_once(f"line {n} of {job.id}, attempt {attempt_no}", told[attempt_no, n])


def _lines(path: Path) -> list[int]:
    if not path.exists():  # its child never got to write
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    lines = [json.loads(line) for line in whole.splitlines()]
    return [line["n"] for line in lines if line["data"].get("kind") != "resume_point_saved"]


def _check_blobs(connection: Connection, folder: Path, findings: Findings) -> None:
    """Every row's blob is there with the bytes that the row says."""
    rows = connection.execute(
        text("SELECT blob_key, bytes, sha256 FROM files WHERE deleted_at IS NULL")
    )
    known = {row.blob_key: (row.bytes, row.sha256) for row in rows}
    for (files,) in connection.execute(text("SELECT files FROM adapters")):
        known |= {file["blob_key"]: (file["bytes"], file["sha256"]) for file in files}
    for key, said in known.items():
        path = folder / key
        if not path.exists():
            findings.lost.append(f"the blob {key}")
            continue
        content = path.read_bytes()
        if (len(content), hashlib.sha256(content).hexdigest()) != said:
            findings.broken.append(f"the blob {key} is another than its row says")
    there = {str(path.relative_to(folder)) for path in _blobs(folder)}
    findings.unreferenced_blobs = len(there - set(known))


def _blobs(folder: Path) -> Iterable[Path]:
    return (p for p in folder.rglob("*") if p.is_file() and ".partial" not in p.parts)


def _rows(connection: Connection, sql: str, job_id: str) -> Sequence[Any]:
    return connection.execute(text(sql), {"id": job_id}).all()
