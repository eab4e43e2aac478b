"""The result file, as OpenAI's users read it."""

import csv
import io
from typing import Any

from sqlalchemy.orm import Session, sessionmaker

from service.db import transaction
from service.events.actions import NewEvent, append
from service.jobs.results import results_csv
from service.tables import DEFAULT_PROJECT, Job
from tests.service.jobs.conftest import Create


def metrics(step: int, attempt_no: int = 2, **data: Any) -> NewEvent:
    return NewEvent(
        f"Step {step}", type="metrics", data={"step": step, **data}, attempt_no=attempt_no
    )


def read(sessions: sessionmaker[Session], job_id: str, *events: NewEvent) -> bytes:
    """Tell `events` and return the result file."""
    with transaction(sessions) as session:
        if events:
            append(session, DEFAULT_PROJECT, job_id, *events)
        return results_csv(session, session.get_one(Job, job_id))


def test_the_header_is_openais_to_the_letter(
    create: Create, sessions: sessionmaker[Session]
) -> None:
    content = read(sessions, create())

    assert content == b"step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n"


def test_steps_are_lines_with_blanks_where_nothing_was_measured(
    create: Create, sessions: sessionmaker[Session]
) -> None:
    content = read(
        sessions,
        create(),
        metrics(0, full_valid_loss=3.5, full_valid_mean_token_accuracy=0.25),
        metrics(1, train_loss=2.0, train_mean_token_accuracy=0.5, learning_rate=1e-4),
        NewEvent("Checkpoint", data={"step": 1, "train_loss": 9}),
        metrics(2, train_loss=1.5, train_mean_token_accuracy=None),
        metrics(2, full_valid_loss=1.75, full_valid_mean_token_accuracy=0.75),
        metrics(3, train_loss=float("nan")),
    )

    assert content.decode().splitlines()[1:] == [
        "0,,,3.5,0.25",
        "1,2.0,0.5,,",
        "2,1.5,,1.75,0.75",
        "3,,,,",
    ]


def test_a_step_counts_as_its_newest_attempt_told_it(
    create: Create, sessions: sessionmaker[Session]
) -> None:
    content = read(
        sessions,
        create(),
        metrics(1, attempt_no=2, train_loss=5.0),
        metrics(2, attempt_no=2, train_loss=4.0, train_mean_token_accuracy=0.5),
        metrics(2, attempt_no=3, train_loss=3.0),
        metrics(2, attempt_no=2, train_loss=9.0),  # read from the lost attempt's file, late
        metrics(3, attempt_no=3, train_loss=2.0),
    )

    assert content.decode().splitlines()[1:] == ["1,5.0,,,", "2,3.0,,,", "3,2.0,,,"]


def test_a_long_job_is_read_whole(create: Create, sessions: sessionmaker[Session]) -> None:
    content = read(sessions, create(), *(metrics(n, train_loss=1 / n) for n in range(1, 2_502)))

    rows = list(csv.DictReader(io.StringIO(content.decode())))
    assert [int(row["step"]) for row in rows] == list(range(1, 2_502))
    assert float(rows[-1]["train_loss"]) == 1 / 2_501
