"""Every log line of an attempt has the job's id and the attempt's number, whichever thread writes it."""

import threading
from collections.abc import Iterator

import pytest
import structlog

from service.logging import get_logger
from tests.worker.conftest import Await, Submit, chat_lines
from worker.companion import Companion
from worker.crew import Crew

Lines = list[dict[str, object]]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """The log lines of this test, with what is bound to their context."""
    caught: Lines = []
    lock = threading.Lock()

    def catch(_logger: object, _method: str, event: structlog.types.EventDict) -> str:
        with lock:
            caught.append(dict(event))
        return ""

    before = structlog.get_config()
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, catch],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    yield caught
    structlog.configure(**before)


def test_a_thread_beside_the_supervisor_has_the_ids_of_whoever_made_it(lines: Lines) -> None:
    log = get_logger("test")
    with structlog.contextvars.bound_contextvars(job_id="ftjob-1", attempt_no=3):
        companion = Companion("beside", lambda: log.warning("said"))
    companion.start()
    companion.join()

    assert lines == [{"event": "said", "job_id": "ftjob-1", "attempt_no": 3}]


def test_the_lines_of_an_attempt_have_its_ids_and_those_of_a_slot_afterwards_do_not(
    lines: Lines, crew: Crew, submit: Submit, await_job: Await
) -> None:
    job_id = submit(chat_lines(10), hyperparameters={"n_epochs": 1, "batch_size": 5})
    await_job(job_id)
    crew.stop()

    told = [line for line in lines if line["event"] == "attempt_ended"]
    assert {line["job_id"] for line in told} == {job_id}
    assert {line["attempt_no"] for line in told} == {1, 2}
    stopped = [line for line in lines if line["event"] == "worker_stopped"]
    assert stopped
    assert all("job_id" not in line for line in stopped)
