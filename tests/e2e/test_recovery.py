"""Killed in mid-run: the job is taken back, goes on from its resume point, finishes, and has one adapter."""

import os
import signal
import time
from collections.abc import Iterator

import psutil
import pytest
from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import Session

from operations.embedded import postgres, valkey
from service.tables import Adapter, Attempt, Job
from tests.e2e.conftest import (
    Deployment,
    User,
    chat_file,
    children_of,
    deploy,
    training_pid,
    wait_until,
)

STEPS = 60  # two steps an epoch, thirty epochs, so there is a resume point soon


def submit(user: User) -> str:
    return user.submit(chat_file(16, words=20), n_epochs=30, batch_size=8)


def attempts_of(service: Deployment, job_id: str) -> list[tuple[str, str | None, int | None]]:
    engine = create_engine(service.environment["NIBBLE_DATABASE_URL"])
    with Session(engine) as session:
        rows = session.scalars(
            select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.attempt_no)
        ).all()
        told = [(row.kind, row.outcome, row.resumed_from_step) for row in rows]
        job = session.get_one(Job, job_id)
        final = session.scalar(
            select(func.count())
            .select_from(Adapter)
            .where(Adapter.job_id == job_id, Adapter.step_number == STEPS)
        )
    engine.dispose()
    if job.status == "succeeded":
        assert final == 1, "exactly one adapter of the last step"
    return told


def check_whole(service: Deployment, user: User, job_id: str, *, lost: str) -> None:
    """The second training attempt went on where the first had left a resume point, and every step is told."""
    validated, first, second = attempts_of(service, job_id)
    assert validated == ("validate", "succeeded", None)
    assert first == ("train", lost, None)
    kind, outcome, from_step = second
    assert (kind, outcome) == ("train", "succeeded")
    assert from_step is not None
    assert from_step >= 2
    messages = user.messages(job_id)
    assert f"Resumed from step {from_step}" in messages
    steps = {
        event.data["step"]
        for event in user.jobs.list_events(job_id, limit=100)
        if event.type == "metrics" and isinstance(event.data, dict)
    }
    assert steps == set(range(1, STEPS + 1))
    checkpoints = list(user.jobs.checkpoints.list(job_id, limit=100))
    assert sorted({c.step_number for c in checkpoints}) == list(range(2, STEPS + 1, 2))
    assert len(checkpoints) == STEPS // 2


def wait_for_a_resume_point(service: Deployment, job_id: str) -> None:
    """Return as soon as the first training attempt has one on the disk, with most of its steps still to come."""
    points = service.data_dir / "attempts" / job_id / "2" / "run" / "resume"
    deadline = time.monotonic() + 120
    while not list(points.glob("step-*")):
        assert time.monotonic() < deadline, service.log("worker")
        time.sleep(0.005)


def test_a_killed_training_child_costs_an_attempt_and_nothing_else(
    service: Deployment, user: User
) -> None:
    job_id = submit(user)
    child = training_pid(service, job_id)
    wait_for_a_resume_point(service, job_id)

    os.kill(child, signal.SIGKILL)
    user.wait(job_id, "succeeded")

    check_whole(service, user, job_id, lost="lost")
    assert any("SIGKILL" in message for message in user.messages(job_id))


def test_a_killed_worker_takes_its_children_along_and_its_successor_takes_the_job_over(
    service: Deployment, user: User
) -> None:
    job_id = submit(user)
    wait_for_a_resume_point(service, job_id)
    worker = service.processes[-1]
    children = children_of(worker)

    worker.send_signal(signal.SIGKILL)
    worker.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    service.start("worker")
    user.wait(job_id, "succeeded")

    check_whole(service, user, job_id, lost="lost")


def test_a_stopped_worker_leaves_a_resume_point_and_loses_nothing(
    service: Deployment, user: User
) -> None:
    job_id = submit(user)
    wait_for_a_resume_point(service, job_id)
    worker = service.processes[-1]

    worker.send_signal(signal.SIGTERM)
    worker.wait(timeout=90)
    waiting = user.jobs.retrieve(job_id).status
    service.start("worker")
    user.wait(job_id, "succeeded")

    assert waiting == "queued"
    assert worker.returncode == 0
    check_whole(service, user, job_id, lost="requeued")


@pytest.fixture
def lonely(
    tmp_path_factory: pytest.TempPathFactory,
    postgres_server: postgres.Postgres,
    _template: str,
    valkey_server: valkey.Valkey,
    model_folder: str,
) -> Iterator[Deployment]:
    """A service without a worker, whose leases are short."""
    yield from deploy(
        tmp_path_factory.mktemp("lonely"),
        postgres_server,
        _template,
        valkey_server,
        model_folder,  # pyright: ignore[reportArgumentType]
        NIBBLE_LEASE_S="2",
        NIBBLE_RENEW_S="0.4",
    )


@pytest.mark.slow
def test_a_worker_that_never_comes_back_is_replaced_by_another_host_after_its_lease(
    lonely: Deployment,
) -> None:
    first = lonely.start("worker")
    user = User(lonely)
    job_id = submit(user)
    user.wait_for_message(job_id, "Step 3/")

    first.send_signal(signal.SIGKILL)
    first.wait()
    wait_until(
        lambda: user.jobs.retrieve(job_id).status == "queued",
        timeout_s=90,
        why="the reaper has not taken the job back",
    )
    elsewhere = lonely.folder / "elsewhere"
    (elsewhere / "data").mkdir(parents=True)
    lonely.start(
        "worker",
        NIBBLE_DATA_DIR=str(elsewhere / "data"),
        NIBBLE_STORAGE_URL=f"file://{lonely.data_dir / 'blobs'}",
    )
    user.wait(job_id, "succeeded")
    user.close()

    _, first_try, second_try = attempts_of(lonely, job_id)
    assert first_try == ("train", "lost", None)
    assert second_try == ("train", "succeeded", None)  # its files were on the other machine
