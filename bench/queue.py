"""What a claim costs with many jobs waiting, and how many jobs per second many workers claim and finish on one PostgreSQL.

python -m bench.queue                 # 1,000 waiting jobs, 100 worker processes; prints, and keeps bench/results/queue-….json
python -m bench.queue --workers 4 --jobs 200 --no-keep

The workers are processes that call `service.queue.claim.claim` and `service.queue.finish.succeeded` and do nothing else,
each over one connection. Beside them in the same run: the floor, as many processes that take rows of a bare table with
`SELECT … FOR UPDATE SKIP LOCKED`, mark them and later delete them, without shares, attempts, events or an outbox.
The server is the embedded one with its own settings (fsync on), and is on the same cores as the workers.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import psycopg
from pydantic import SecretStr
from sqlalchemy import Engine, text

from bench.surroundings import RESULTS, surroundings
from operations import migrate
from operations.embedded import postgres
from service import db
from service.queue import finish
from service.queue.claim import claim
from service.settings import Settings

PROJECTS = 10
CLAIMS_TIMED = 200
_WARM_UP = 5
_LEASE_S = 600.0
_PATIENCE_S = 60.0  # a hundred processes share the cores with the server

_FILL = """
INSERT INTO projects (id, name, weight, created_at)
SELECT 'proj_' || n, 'p' || n, 1 + n % 3, now() FROM generate_series(1, :projects) n ON CONFLICT DO NOTHING;
INSERT INTO files (id, project_id, filename, purpose, bytes, sha256, blob_key, created_at)
SELECT 'file_' || n, 'proj_' || n, 't.jsonl', 'fine-tune', 1, '0', 'k', now()
FROM generate_series(1, :projects) n ON CONFLICT DO NOTHING;
INSERT INTO jobs (id, project_id, created_at, status, model, training_file, seed, spec, hyperparameters, dataset_report,
                  priority, memory_needed_bytes)
SELECT 'ftjob-' || :round || '-' || n, 'proj_' || 1 + n % :projects, now() + n * interval '1 ms', 'queued', 'tiny',
       'file_' || 1 + n % :projects, 0, jsonb_build_object('method', 'supervised', 'filler', repeat('x', 500)),
       jsonb_build_object('n_epochs', 3, 'filler', repeat('y', 500)),
       jsonb_build_object('n_examples', 100, 'filler', repeat('z', 1000)), n % 2, n * 1000
FROM generate_series(1, :jobs) n;
"""
_BARE_FILL = """
DROP TABLE IF EXISTS bare;
CREATE TABLE bare (id bigint PRIMARY KEY, state text NOT NULL, owner text);
CREATE INDEX bare_waiting ON bare (id) WHERE state = 'queued';
INSERT INTO bare SELECT n, 'queued' FROM generate_series(1, {jobs}) n;
"""
_WAITS = """
SELECT coalesce(wait_event_type || ':' || wait_event, 'running'), count(*) FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() GROUP BY 1
"""
_LOOK_S = 0.1
_BARE_CLAIM = """
UPDATE bare SET state = 'running', owner = %s
WHERE id = (SELECT id FROM bare WHERE state = 'queued' ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED) RETURNING id
"""


def main(arguments: list[str] | None = None) -> int:
    """Run both measurements, print them, and keep them unless told not to."""
    parser = argparse.ArgumentParser(prog="python -m bench.queue", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1_000, help="that wait when claims are timed")
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--finish", type=int, default=1_000, help="jobs that the workers share")
    parser.add_argument("--no-keep", action="store_true", help="print only")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        connections = {"max_connections": str(asked.workers + 20)}
        server = postgres.start(Path(folder), settings=connections)
        try:
            migrate.upgrade(server.url)
            found = measure(server.url, asked)
        finally:
            server.stop()
    told = surroundings("sqlalchemy", "psycopg") | vars(asked) | found
    print(json.dumps(told, indent=1))
    if not asked.no_keep:
        file = RESULTS / f"queue-cpu-{told['commit']}.json"
        file.write_text(json.dumps(told, indent=1) + "\n")
    return 0


def measure(url: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Time single claims, then the crowd of workers, then the floor."""
    engine = _engine(url)
    fill(engine, asked.jobs, round_=1)
    claims = time_claims(engine, min(CLAIMS_TIMED, asked.jobs - _WARM_UP))
    with engine.begin() as connection:
        connection.execute(text("TRUNCATE jobs CASCADE"))
    fill(engine, asked.finish, round_=2)
    seconds, taken, waits = crowd(asked.workers, claim_and_finish, url)
    with engine.connect() as connection:
        succeeded, attempts, jobs = connection.execute(
            text(
                "SELECT count(*) FILTER (WHERE status = 'succeeded'), (SELECT count(*) FROM attempts), count(*) FROM jobs"
            )
        ).one()
    engine.dispose()
    with psycopg.connect(_plain(url), autocommit=True) as connection:
        connection.execute(_BARE_FILL.format(jobs=asked.finish).encode())
    bare_seconds, bare_taken, bare_waits = crowd(asked.workers, claim_and_finish_bare, url)
    return {
        "claim_ms": {
            "median": statistics.median(claims) * 1e3,
            "p95": statistics.quantiles(claims, n=20)[-1] * 1e3,
            "worst": max(claims) * 1e3,
        },
        "jobs_per_s": taken / seconds,
        "claimed": taken,
        "claimed_twice": attempts - jobs,
        "not_finished": jobs - succeeded,
        "waits": waits,
        "bare_waits": bare_waits,
        "bare_jobs_per_s": bare_taken / bare_seconds,
        "share_of_bare": (taken / seconds) / (bare_taken / bare_seconds),
    }


def fill(engine: Engine, jobs: int, *, round_: int) -> None:
    """Have so many jobs of ten projects wait, each row as wide as a real one."""
    with engine.begin() as connection:
        for statement in _FILL.split(";\n"):
            if statement.strip():
                connection.execute(
                    text(statement), {"projects": PROJECTS, "jobs": jobs, "round": str(round_)}
                )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))


def time_claims(engine: Engine, count: int) -> list[float]:
    """Return the seconds of each claim, commit included, by one worker with nobody beside it."""
    factory = db.sessions(engine)
    found: list[float] = []
    for _ in range(count + _WARM_UP):  # the first compile their statements
        began = time.perf_counter()
        with db.transaction(factory) as session:
            taken = claim(
                session,
                kind="train",
                worker_id="w",
                host="h",
                lease_s=_LEASE_S,
                room_bytes=1 << 40,
            )
        found.append(time.perf_counter() - began)
        if taken is None:
            raise RuntimeError("fewer jobs waited than were to be claimed")
    return found[_WARM_UP:]


def crowd(
    workers: int, act: Callable[[str, int, Barrier], tuple[int, float]], url: str
) -> tuple[float, int, dict[str, float]]:
    """Run `act` in so many processes, begun together, and look meanwhile what the server's processes wait for.

    Returns:
        The seconds until the last one's end, the sum of what they return, and each wait's share of all looks.
    """
    context = multiprocessing.get_context(
        "fork"
    )  # a hundred imports would take longer than all jobs
    barrier = context.Barrier(workers + 1)
    results = context.SimpleQueue()

    def run(number: int) -> None:
        count, began = act(url, number, barrier)
        results.put((count, began, time.perf_counter()))

    processes = [context.Process(target=run, args=(number,)) for number in range(workers)]
    for process in processes:
        process.start()
    barrier.wait()
    waits: Counter[str] = Counter()
    with psycopg.connect(_plain(url), autocommit=True) as connection:
        while results.empty():  # the first one that finds nothing left
            waits.update(dict(connection.execute(_WAITS).fetchall()))
            time.sleep(_LOOK_S)
    counts, begins, ends = zip(*(results.get() for _ in processes), strict=True)
    seconds = max(ends) - min(
        begins
    )  # one clock for all processes: they may be done before this one is woken
    for process in processes:
        process.join()
    looks = sum(waits.values()) or 1
    return seconds, sum(counts), {name: count / looks for name, count in waits.most_common(8)}


def claim_and_finish(url: str, number: int, barrier: Barrier) -> tuple[int, float]:
    """Claim and finish until nothing waits; return how many, and when it began."""
    engine = _engine(url)
    factory = db.sessions(engine)
    with engine.connect():  # connected before the clock starts
        pass
    barrier.wait()
    count, began = 0, time.perf_counter()
    while True:
        with db.transaction(factory) as session:
            taken = claim(
                session,
                kind="train",
                worker_id=f"worker_{number}",
                host="h",
                lease_s=_LEASE_S,
                room_bytes=1 << 40,
            )
        if taken is None:
            engine.dispose()
            return count, began
        with db.transaction(factory) as session:
            finish.succeeded(
                session,
                taken.fence,
                fine_tuned_model=f"ft:tiny:{taken.job.id}",
                adapter_step=1,
                trained_tokens=1,
                result_file="file_1",
                detail={},
            )
        count += 1


def claim_and_finish_bare(url: str, number: int, barrier: Barrier) -> tuple[int, float]:
    """The same of a bare table."""
    with psycopg.connect(_plain(url), autocommit=True) as connection:
        barrier.wait()
        count, began = 0, time.perf_counter()
        while (row := connection.execute(_BARE_CLAIM, (str(number),)).fetchone()) is not None:
            connection.execute("DELETE FROM bare WHERE id = %s AND owner = %s", (*row, str(number)))
            count += 1
        return count, began


def _engine(url: str) -> Engine:
    settings = Settings(
        _env_file=None,  # pyright: ignore[reportCallIssue]
        database_url=SecretStr(url),
    )
    return db.connect(settings, pool_size=1, patience_s=_PATIENCE_S)


def _plain(url: str) -> str:
    return url.replace("postgresql+psycopg://", "postgresql://")


if __name__ == "__main__":
    sys.exit(main())
