import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from service.db import transaction
from service.queue.claim import Claim, claim
from service.settings import Settings
from service.tables import Event, Job
from tests.worker.conftest import chat_lines
from worker.context import WorkerContext
from worker.crew import Crew
from worker.relay import Pace, Relay, Tail, tell_lines

Submit = Callable[..., str]


def line(n: int, **more: Any) -> str:
    value = {"n": n, "at": 1.0, "level": "info", "type": "message", "message": f"m{n}", "data": {}}
    return json.dumps(value | more) + "\n"


@pytest.fixture
def context(settings: Settings) -> Iterator[WorkerContext]:
    """A worker that was never started."""
    crew = Crew(settings)
    yield crew.context
    crew.stop()


@pytest.fixture
def claimed(submit: Submit, sessions: sessionmaker[Session], context: WorkerContext) -> Claim:
    """A job in the hands of this worker."""
    submit(chat_lines(12))
    with transaction(sessions) as session:
        found = claim(
            session, kind="validate", worker_id=context.worker_id, host="here", lease_s=60
        )
    assert found is not None
    return found


def messages(story: Callable[[str], list[Event]], job_id: str) -> list[str]:
    return [event.message for event in story(job_id) if event.line_no is not None]


def test_half_a_line_waits_for_its_other_half(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = Tail(path)
    before = tail.read()
    path.write_text(line(1) + line(2)[:10], encoding="utf-8")
    first = tail.read()
    with path.open("a", encoding="utf-8") as file:
        file.write(line(2)[10:])

    second = tail.read()

    assert (before, [got.n for got in first], [got.n for got in second]) == ([], [1], [2])


def test_what_is_no_line_of_ours_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("garbage\n" + "[1]\n" + line(3), encoding="utf-8")

    lines = Tail(path).read()

    assert [got.n for got in lines] == [3]


def test_a_file_read_again_tells_nothing_twice(
    context: WorkerContext,
    claimed: Claim,
    tmp_path: Path,
    story: Callable[[str], list[Event]],
) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(line(1) + line(2) + line(3, data={"kind": "resume_point_saved"}), "utf-8")
    never = threading.Event()
    tell_lines(context, claimed.fence, Tail(path).read(), wait=never.wait)
    with path.open("a", encoding="utf-8") as file:
        file.write(line(4))

    tell_lines(context, claimed.fence, Tail(path).read(), wait=never.wait)

    assert messages(story, claimed.job.id) == ["m1", "m2", "m4"]


def test_what_was_written_before_the_end_is_told_and_a_database_outage_loses_nothing(
    context: WorkerContext,
    claimed: Claim,
    tmp_path: Path,
    session: Session,
    story: Callable[[str], list[Event]],
) -> None:
    path = tmp_path / "events.jsonl"
    relay = Relay(
        context,
        claimed.fence,
        path,
        on_checkpoint=lambda _: None,
        give_up=threading.Event(),
    )
    session.execute(text("SELECT 1 FROM jobs WHERE id = :id FOR UPDATE"), {"id": claimed.job.id})
    relay.start()
    path.write_text("".join(line(n) for n in range(1, 501)), encoding="utf-8")
    others = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
    )
    for _ in range(3):
        threading.Event().wait(0.3)
        session.execute(text(f"{others} AND pid <> pg_backend_pid()"))
    session.rollback()

    relay.finish()

    assert messages(story, claimed.job.id) == [f"m{n}" for n in range(1, 501)]


def test_an_attempt_that_lost_its_job_tells_nothing(
    context: WorkerContext,
    claimed: Claim,
    tmp_path: Path,
    session: Session,
    story: Callable[[str], list[Event]],
) -> None:
    session.get_one(Job, claimed.job.id).attempt_no += 1
    session.commit()
    path = tmp_path / "events.jsonl"
    path.write_text(line(1), encoding="utf-8")
    relay = Relay(
        context,
        claimed.fence,
        path,
        on_checkpoint=lambda _: None,
        give_up=threading.Event(),
    )

    relay.start()
    relay.finish()

    assert messages(story, claimed.job.id) == []


def test_the_finish_is_estimated_from_the_pace_of_the_steps(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    data = {"step": 10, "total_steps": 110, "step_time_s": 2.0}
    path.write_text(line(1) + line(2, type="metrics", data=data), encoding="utf-8")

    finish = Pace().estimate(Tail(path).read())

    assert finish is not None
    from service import clock

    assert 195 < (finish - clock.now()).total_seconds() <= 200
