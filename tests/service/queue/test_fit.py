"""Jobs and the GPUs that they fit: who claims what, and who is told that nobody can."""

from collections.abc import Callable
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from service.db import transaction
from service.queue.claim import Claim, claim
from service.queue.fit import RESERVED_BYTES, fits, room, why_unfit
from service.queue.unfit import tell_unfit
from service.queue.workers import WorkerSlots, sign_in
from service.tables import Event, Job

MakeJob = Callable[..., str]
GIB = 1 << 30


def take(sessions: sessionmaker[Session], room_bytes: int | None) -> str | None:
    with transaction(sessions) as session:
        taken: Claim | None = claim(
            session,
            kind="train",
            worker_id="worker_a",
            host="here",
            lease_s=60,
            room_bytes=room_bytes,
        )
        return None if taken is None else taken.job.id


def have_worker(sessions: sessionmaker[Session], *gib: int | None) -> None:
    devices: list[dict[str, Any]] = [
        {"name": "card", "memory_bytes": None if size is None else size * GIB} for size in gib
    ]
    slots = WorkerSlots(train=len(gib), validate=0, devices=devices)
    with transaction(sessions) as session:
        sign_in(session, worker_id=f"worker_{gib}", host="here", pid=1, slots=slots)


def test_a_slot_takes_the_next_job_that_fits_and_leaves_the_others_for_a_larger_one(
    make_job: MakeJob, sessions: sessionmaker[Session]
) -> None:
    large = make_job(memory_needed_bytes=40 * GIB)
    small = make_job(memory_needed_bytes=10 * GIB)
    unknown = make_job()

    by_small = [take(sessions, 23 * GIB) for _ in range(3)]
    by_large = take(sessions, 79 * GIB)

    assert by_small == [small, unknown, None]
    assert by_large == large


def test_a_need_of_just_the_room_fits_and_one_byte_more_does_not(
    make_job: MakeJob, sessions: sessionmaker[Session]
) -> None:
    exact = make_job(memory_needed_bytes=5000)
    make_job(memory_needed_bytes=5001)

    assert [take(sessions, 5000), take(sessions, 5000)] == [exact, None]
    assert (fits(5000, 5000), fits(5001, 5000)) == (True, False)


def test_a_device_of_unknown_size_takes_anything(
    make_job: MakeJob, sessions: sessionmaker[Session]
) -> None:
    job_id = make_job(memory_needed_bytes=1 << 50)

    assert take(sessions, None) == job_id


def test_what_a_device_has_for_a_job_is_less_than_its_memory_and_never_negative() -> None:
    assert room(24 * GIB) == 24 * GIB - RESERVED_BYTES
    assert room(1) == 0
    assert room(None) is None


def test_a_sentence_says_what_would_fit_only_where_nothing_does() -> None:
    sentence = why_unfit(40 * GIB, [23 * GIB, 15 * GIB])

    assert sentence is not None
    assert "a GPU with 41.0 GiB" in sentence
    assert "the largest that a worker has now has 24.0 GiB" in sentence
    assert why_unfit(23 * GIB, [23 * GIB]) is None
    assert why_unfit(40 * GIB, [23 * GIB, None]) is None
    assert why_unfit(40 * GIB, []) is None
    assert why_unfit(None, [23 * GIB]) is None


def test_a_job_that_fits_no_worker_is_told_once_and_waits(
    make_job: MakeJob, sessions: sessionmaker[Session], session: Session
) -> None:
    have_worker(sessions, 24, 16)
    job_id = make_job(memory_needed_bytes=40 * GIB)
    make_job(memory_needed_bytes=20 * GIB)

    told = []
    for _ in range(2):
        with transaction(sessions) as tx:
            told.append(tell_unfit(tx, lease_s=60))

    assert told == [1, 0]
    event = session.scalars(select(Event)).one()
    assert (event.job_id, event.level) == (job_id, "warn")
    assert event.message == why_unfit(40 * GIB, [23 * GIB, 15 * GIB])
    assert session.get_one(Job, job_id).status == "queued"


def test_nobody_is_told_anything_while_there_is_no_worker_or_one_of_unknown_size(
    make_job: MakeJob, sessions: sessionmaker[Session]
) -> None:
    make_job(memory_needed_bytes=40 * GIB)

    with transaction(sessions) as tx:
        without_workers = tell_unfit(tx, lease_s=60)
    have_worker(sessions, 24)
    have_worker(sessions, None)
    with transaction(sessions) as tx:
        with_a_cpu = tell_unfit(tx, lease_s=60)

    assert (without_workers, with_a_cpu) == (0, 0)
