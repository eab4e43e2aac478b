import os
import time
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from service.settings import Settings
from service.tables import Job
from tests.worker.conftest import chat_lines
from worker.context import WorkerContext
from worker.crew import Crew
from worker.folder import AttemptFolder
from worker.sweep import sweep

Submit = Callable[..., str]


@pytest.fixture
def context(settings: Settings) -> Iterator[WorkerContext]:
    """A worker that was never started."""
    crew = Crew(settings)
    yield crew.context
    crew.stop()


def left_behind(context: WorkerContext, job_id: str) -> AttemptFolder:
    folder = context.folder(job_id, 1)
    folder.create()
    (folder.inputs / "training_file.jsonl").write_bytes(b"x")
    folder.log.write_text("words", encoding="utf-8")
    return folder


def test_only_what_ended_jobs_left_is_cleared_and_their_log_stays(
    context: WorkerContext, submit: Submit, session: Session
) -> None:
    ended, waiting = submit(chat_lines(12)), submit(chat_lines(12))
    session.execute(update(Job).where(Job.id == ended).values(status="cancelled"))
    session.commit()
    gone, kept = left_behind(context, ended), left_behind(context, waiting)

    first, again = sweep(context), sweep(context)

    assert (first, again) == (1, 0)
    assert not gone.run.exists()
    assert not gone.inputs.exists()
    assert gone.log.exists()
    assert kept.inputs.exists()


def test_what_is_left_of_an_ended_job_goes_after_some_days_and_a_waiting_jobs_never(
    context: WorkerContext, submit: Submit, session: Session
) -> None:
    old, recent, waiting = (submit(chat_lines(12)) for _ in range(3))
    session.execute(update(Job).where(Job.id.in_((old, recent))).values(status="failed"))
    session.commit()
    folders = [left_behind(context, job_id).path.parent for job_id in (old, recent, waiting)]
    for folder in (folders[0], folders[2]):
        long_ago = time.time() - 31 * 86_400
        for path in (*folder.glob("*"), folder):
            os.utime(path, (long_ago, long_ago))

    sweep(context)

    assert [folder.exists() for folder in folders] == [False, True, True]
