"""A job's story has no gaps, no doubles and no late arrivals, whoever tells it."""

import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, sessionmaker

from service.db import transaction
from service.events import actions
from service.events.actions import NewEvent, append
from service.events.content import storable, storable_text
from service.tables import DEFAULT_PROJECT, Event


def test_many_writers_leave_no_gap_and_a_reader_sees_no_late_arrival(
    job_id: str, sessions: sessionmaker[Session]
) -> None:
    def write(writer: int) -> None:
        for n in range(10):
            with transaction(sessions) as session:
                append(
                    session,
                    DEFAULT_PROJECT,
                    job_id,
                    NewEvent(f"{writer}.{n} a"),
                    NewEvent(f"{writer}.{n} b"),
                )

    writers = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in writers:
        thread.start()
    seen: list[int] = []
    while len(seen) < 80:
        with transaction(sessions) as session:
            last = seen[-1] if seen else 0
            seen += [
                e.seq
                for e in actions.following(session, DEFAULT_PROJECT, job_id, after=last, limit=7)
            ]
    for thread in writers:
        thread.join()

    assert seen == list(range(1, 81))


def test_a_rollback_leaves_no_gap(job_id: str, sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        append(session, DEFAULT_PROJECT, job_id, NewEvent("lost"))
        session.rollback()

    with transaction(sessions) as session:
        assert append(session, DEFAULT_PROJECT, job_id, NewEvent("kept")) == 1


def test_a_line_of_an_attempts_file_is_told_once(
    job_id: str, sessions: sessionmaker[Session]
) -> None:
    line = NewEvent("x", attempt_no=1, line_no=1)
    with transaction(sessions) as session:
        append(session, DEFAULT_PROJECT, job_id, line)

    with pytest.raises(IntegrityError), transaction(sessions) as session:
        append(session, DEFAULT_PROJECT, job_id, line)


def test_nothing_to_append_is_the_callers_error(
    job_id: str, sessions: sessionmaker[Session]
) -> None:
    with pytest.raises(ValueError, match="no events"), transaction(sessions) as session:
        append(session, DEFAULT_PROJECT, job_id)


def test_what_the_database_cannot_hold_is_mended(
    job_id: str, sessions: sessionmaker[Session]
) -> None:
    odd = NewEvent(
        "a\0b\ud83d",
        data={"loss": float("nan"), "up": float("inf"), "k\0": ("\udc00", [1, True, None, "é😀"])},
    )

    with transaction(sessions) as session:
        append(session, DEFAULT_PROJECT, job_id, odd)

    with transaction(sessions) as session:
        event = session.scalars(select(Event)).one()
        assert event.message == "a\ufffdb\ufffd"
        assert event.data == {
            "loss": None,
            "up": None,
            "k\ufffd": ["\ufffd", [1, True, None, "é😀"]],
        }


def test_an_endless_message_is_cut() -> None:
    assert storable_text("x" * 20_000) == "x" * 20_000
    cut = storable_text("x" * 20_001)
    assert (len(cut), cut[-1]) == (20_000, "…")


characters = st.characters(codec=None, categories=("Cs", "Cc", "Ll", "So"), max_codepoint=0x1F6FF)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(characters, max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(characters, max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["a", "b\0", "\ud800"]), values))
def test_anything_becomes_json_that_postgresql_takes(data: dict[str, object]) -> None:
    mended = storable(data)

    text = json.dumps(mended, allow_nan=False, ensure_ascii=False)
    assert "\\u0000" not in text
    text.encode()  # no half of a surrogate pair left
    assert storable(mended) == mended
