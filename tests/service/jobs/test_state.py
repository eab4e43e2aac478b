"""Moves between states: only along the arrows, only under the fence, whatever is said with them."""

import pytest
from sqlalchemy.orm import Session, sessionmaker

from service.db import transaction
from service.events.actions import NewEvent
from service.jobs.state import SOURCES, TERMINAL, Fenced, Status, move
from service.tables import JOB_STATUSES, Event, Job, Outbox
from tests.service.jobs.conftest import Create


def put(session: Session, job_id: str, status: Status, *, lease: str | None = None) -> None:
    """Set a job's status as no code of ours may."""
    job = session.get_one(Job, job_id)
    job.status, job.lease_owner, job.attempt_no = status, lease, 3


@pytest.mark.parametrize("to", SOURCES)
@pytest.mark.parametrize("source", JOB_STATUSES)
def test_a_job_moves_only_along_the_arrows(
    create: Create, sessions: sessionmaker[Session], session: Session, source: Status, to: Status
) -> None:
    job_id = create()
    with transaction(sessions) as before:
        put(before, job_id, source)

    moved = True
    try:
        with transaction(sessions) as own:
            move(own, job_id, to, NewEvent("moved"))
    except Fenced:
        moved = False

    job = session.get_one(Job, job_id)
    told = session.query(Event).filter(Event.message == "moved").count()
    assert moved == (source in SOURCES[to])
    assert job.status == (to if moved else source)
    assert told == (1 if moved else 0)
    ended = moved and to in TERMINAL
    assert (job.finished_at is not None) == ended
    assert session.query(Outbox).count() == (1 if ended else 0)


@pytest.mark.parametrize(("attempt_no", "lease"), [(2, "w"), (4, "w"), (3, None)])
def test_a_worker_without_the_newest_attempt_and_its_lease_moves_nothing(
    create: Create,
    sessions: sessionmaker[Session],
    session: Session,
    attempt_no: int,
    lease: str | None,
) -> None:
    job_id = create()
    with transaction(sessions) as before:
        put(before, job_id, "running", lease=lease)

    with pytest.raises(Fenced), transaction(sessions) as own:
        move(own, job_id, "succeeded", NewEvent("moved"), attempt_no=attempt_no)

    assert session.get_one(Job, job_id).status == "running"


def test_what_a_run_quotes_is_made_fit_for_the_database(
    create: Create, sessions: sessionmaker[Session], session: Session
) -> None:
    job_id = create()

    with transaction(sessions) as own:
        move(
            own,
            job_id,
            "failed",
            NewEvent("line 3: '\0'"),
            error={"code": "c", "message": "line 3: '\0'", "param": None},
            dataset_report={"training_file": {"errors": [{"message": "\ud800"}]}},
        )

    job = session.get_one(Job, job_id)
    assert job.error is not None
    assert job.error["message"] == "line 3: '\ufffd'"
    assert job.dataset_report == {"training_file": {"errors": [{"message": "\ufffd"}]}}
