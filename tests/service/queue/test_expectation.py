"""A job's place in the line, held to the order in which claims really take, and what is known of its start."""

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session, sessionmaker

from service import clock
from service.db import transaction
from service.queue import line_repository
from service.queue.claim import Claim
from service.queue.expectation import Place, TrainingSlot, expected_starts, places
from service.queue.workers import WorkerSlots, sign_in
from service.tables import Job, Project

MakeJob = Callable[..., str]
MakeClaim = Callable[..., Claim | None]

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def at(minutes: float) -> datetime:
    return NOW + timedelta(minutes=minutes)


def free(minutes: float | None, room: int | None = None) -> TrainingSlot:
    return TrainingSlot(room, None if minutes is None else at(minutes))


@pytest.mark.parametrize(
    ("needs", "slots", "starts"),
    [
        ([], [free(0)], []),
        ([None], [], [None]),
        ([None, None], [free(30), free(10)], [10, 30]),
        ([None, None], [free(-5)], [0, None]),  # the second would need the slot again
        ([None], [free(10), free(None)], [None]),  # the other may be free sooner
        ([None, None], [free(0), free(None)], [0, None]),  # what is free now is certain
        ([50, 10], [free(5, room=20), free(60, room=90)], [60, 5]),
        ([99, 10], [free(5, room=20)], [None, 5]),  # what fits nowhere takes nothing
        ([50, 10], [free(0, room=20), free(None, room=90)], [None, 0]),
        ([None, 10], [free(9, room=20), free(None, room=90)], [None, None]),
        ([10, 10], [free(0, room=None), free(7, room=9)], [0, None]),
    ],
)
def test_a_start_is_told_where_every_slot_that_matters_is_known(
    needs: list[int | None], slots: list[TrainingSlot], starts: list[float | None]
) -> None:
    expected = [None if start is None else at(start) for start in starts]

    assert expected_starts(needs, slots, now=NOW) == expected


def look(
    sessions: sessionmaker[Session], job_ids: list[str], lease_s: float = 60
) -> dict[str, Place]:
    with transaction(sessions) as session:
        jobs = [session.get_one(Job, job_id) for job_id in job_ids]
        return places(session, jobs, lease_s=lease_s)


def have_worker(sessions: sessionmaker[Session], worker_id: str, train: int) -> None:
    devices = [{"name": "cpu", "memory_bytes": None}] * train
    with transaction(sessions) as session:
        slots = WorkerSlots(train=train, validate=1, devices=devices)
        sign_in(session, worker_id=worker_id, host="here", pid=1, slots=slots)


@pytest.mark.parametrize("seed", range(4))
def test_positions_are_the_order_in_which_claims_take(
    make_job: MakeJob, make_claim: MakeClaim, sessions: sessionmaker[Session], seed: int
) -> None:
    dice = random.Random(seed)
    projects = ["proj_a", "proj_b", "proj_c"]
    for _ in range(15):
        make_job(project_id=dice.choice(projects), priority=dice.choice([0, 0, 3]))
    with transaction(sessions) as session:
        for project in session.query(Project):
            project.weight = dice.choice([1, 2, 5])
    held = [make_claim() for _ in range(3)]
    with sessions() as session:
        waiting = [job.id for job in session.query(Job) if job.status == "queued"]

    positions = {job_id: place.position for job_id, place in look(sessions, waiting).items()}
    taken = [claimed.job.id for claimed in iter(make_claim, None) if claimed is not None]

    assert None not in held
    assert len(taken) == 12
    assert positions == {job_id: n for n, job_id in enumerate(taken, 1)}


def test_only_what_waits_for_training_now_has_a_place(
    make_job: MakeJob, sessions: sessionmaker[Session]
) -> None:
    others = [
        make_job(status="validating_files"),
        make_job(status="paused"),
        make_job(status="succeeded"),
        make_job(not_before=clock.now() + timedelta(hours=1)),
    ]
    waiting = make_job()

    found = look(sessions, [*others, waiting])

    assert found == {waiting: Place(position=1)}


def test_an_idle_worker_starts_the_next_job_now_and_a_lost_one_starts_nothing(
    make_job: MakeJob, sessions: sessionmaker[Session]
) -> None:
    have_worker(sessions, "worker_a", 1)
    job_id = make_job()
    before = clock.now()

    idle = look(sessions, [job_id])[job_id].expected_start
    lost = look(sessions, [job_id], lease_s=0)[job_id].expected_start

    assert idle is not None
    assert before <= idle <= clock.now()
    assert lost is None


def test_the_next_start_is_the_running_jobs_estimated_finish_while_that_is_ahead(
    make_job: MakeJob, make_claim: MakeClaim, sessions: sessionmaker[Session]
) -> None:
    have_worker(sessions, "worker_a", 1)
    running, next_one, after_it = make_job(), make_job(), make_job()
    make_claim(worker_id="worker_a")
    soon = clock.now() + timedelta(minutes=5)

    def expected(finish: datetime | None) -> list[datetime | None]:
        with transaction(sessions) as session:
            session.execute(update(Job).where(Job.id == running).values(estimated_finish=finish))
        found = look(sessions, [next_one, after_it])
        return [found[job_id].expected_start for job_id in (next_one, after_it)]

    assert expected(None) == [None, None]
    assert expected(soon) == [soon, None]
    assert expected(soon - timedelta(hours=1)) == [None, None]


def test_the_line_is_read_in_part_and_says_the_same(
    make_job: MakeJob, sessions: sessionmaker[Session]
) -> None:
    jobs = [make_job() for _ in range(6)]

    with transaction(sessions) as session:
        line = line_repository.line(session, first=2, job_ids=[jobs[4]])

    assert [(one.job_id, one.position) for one in line] == [
        (jobs[0], 1),
        (jobs[1], 2),
        (jobs[4], 5),
    ]
