"""Creating jobs: once per call, however often and however concurrently the call is repeated."""

import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session, sessionmaker

from service import clock
from service.db import transaction
from service.errors import IdempotencyKeyReused, InvalidRequest, ServiceError, TooManyJobs
from service.files.actions import delete_file
from service.jobs import wishes
from service.keys.actions import Caller
from service.tables import DEFAULT_PROJECT, Event, Job, Project, Submission
from tests.service.jobs.conftest import CALLER, Create


def count(session: Session) -> int:
    return session.scalars(select(func.count()).select_from(Job)).one()


def race(call: Callable[[], str], threads: int = 8) -> list[str | ServiceError]:
    """Run `call` in several threads that start as one, and return what each gave or raised."""
    start = threading.Barrier(threads)
    outcomes: list[str | ServiceError] = []

    def run() -> None:
        start.wait()
        try:
            outcomes.append(call())
        except ServiceError as error:
            outcomes.append(error)

    running = [threading.Thread(target=run) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return outcomes


def test_two_calls_with_one_body_are_two_jobs(create: Create, session: Session) -> None:
    first, second = create(), create()

    assert first != second
    assert count(session) == 2


def test_one_key_makes_one_job(create: Create, session: Session) -> None:
    first, second = create(key="k"), create(key="k")

    assert first == second
    assert count(session) == 1
    assert session.scalars(select(func.count()).select_from(Event)).one() == 1


def test_one_key_with_another_body_is_refused(create: Create, session: Session) -> None:
    create(key="k", seed=1)

    with pytest.raises(IdempotencyKeyReused) as refusal:
        create(key="k", seed=2)

    assert refusal.value.code == "idempotency_key_reused"
    assert refusal.value.should_retry is False
    assert count(session) == 1


def test_one_key_in_two_projects_is_two_keys(
    create: Create, sessions: sessionmaker[Session], file_id: str
) -> None:
    with transaction(sessions) as session:
        session.add(Project(id="proj_other", name="Other", created_at=clock.now()))
    create(key="k")

    # The file is not theirs, which is found only after the key was not.
    with pytest.raises(InvalidRequest, match=f"No such File object: {file_id}"):
        create(key="k", caller=Caller(project_id="proj_other", key_id="key_theirs"))


def test_a_keyed_call_finds_its_job_after_the_file_is_gone(
    create: Create, sessions: sessionmaker[Session], file_id: str
) -> None:
    first = create(key="k")
    with transaction(sessions) as session:
        wishes.cancel(session, DEFAULT_PROJECT, first)
        delete_file(session, DEFAULT_PROJECT, file_id)

    assert create(key="k") == first
    with pytest.raises(InvalidRequest, match="No such File object"):
        create(key="other")


def test_a_refused_call_leaves_its_key_free(create: Create) -> None:
    with pytest.raises(TooManyJobs):
        create(key="k", max_waiting_jobs=0)

    assert create(key="k").startswith("ftjob-")


@pytest.mark.parametrize("key", ["", "x" * 256, "a\nb"])
def test_a_key_that_cannot_be_kept_is_refused(create: Create, key: str) -> None:
    with pytest.raises(InvalidRequest, match="1 to 255 printable"):
        create(key=key)


def test_the_longest_key_is_kept(create: Create) -> None:
    assert create(key="x" * 255) == create(key="x" * 255)


def test_the_sdks_own_retry_finds_the_first_job(create: Create, session: Session) -> None:
    first = create(retry="0")

    assert create(retry="1") == first
    assert create(retry="2") == first
    assert count(session) == 1


def test_a_retry_whose_first_call_never_came_makes_the_job(create: Create) -> None:
    first = create(retry="1")

    assert create(retry="2") == first


def test_a_retry_finds_the_newest_of_several_like_jobs(create: Create) -> None:
    create()
    second = create()

    assert create(retry="1") == second


@pytest.mark.parametrize(
    ("seed", "caller"),
    [(2, CALLER), (1, Caller(project_id=DEFAULT_PROJECT, key_id="key_other"))],
    ids=["another body", "another key"],
)
def test_a_retry_of_something_else_is_a_job_of_its_own(
    create: Create, seed: int, caller: Caller
) -> None:
    first = create()

    assert create(retry="1", seed=seed, caller=caller) != first


def test_a_retry_after_ten_minutes_is_a_new_call(
    create: Create, sessions: sessionmaker[Session]
) -> None:
    first = create()
    with transaction(sessions) as session:
        session.get_one(Submission, first).created_at -= timedelta(minutes=10, seconds=1)

    assert create(retry="1") != first


@pytest.mark.parametrize("odd", ["", "x", "-1", "1.5", "²"])
def test_an_odd_retry_count_is_no_retry(create: Create, odd: str) -> None:
    assert create() != create(retry=odd)


@pytest.mark.parametrize("repeated", [{"key": "k"}, {"retry": "1"}], ids=["key", "retry"])
def test_concurrent_repeats_make_one_job(
    create: Create, session: Session, repeated: dict[str, str]
) -> None:
    outcomes = race(lambda: create(**repeated))

    assert len(set(outcomes)) == 1
    assert count(session) == 1


def test_a_retry_that_overtakes_its_call_waits_for_it(create: Create, session: Session) -> None:
    calls = iter([{"retry": "0"}, *[{"retry": str(n)} for n in range(1, 8)]])
    lock = threading.Lock()

    def call() -> str:
        with lock:
            arguments = next(calls)
        return create(**arguments)

    outcomes = race(call)

    # Whichever came first made the job; only the first call itself, when late, is a second one.
    assert count(session) <= 2
    assert not [outcome for outcome in outcomes if isinstance(outcome, ServiceError)]


def test_concurrent_calls_do_not_get_past_the_limit(create: Create, session: Session) -> None:
    outcomes = race(lambda: create(max_waiting_jobs=3))

    refused = [outcome for outcome in outcomes if isinstance(outcome, TooManyJobs)]
    assert count(session) == 3
    assert len(refused) == 5
    assert refused[0].should_retry is False
    assert "3 jobs waiting" in refused[0].message


def test_a_file_is_not_deleted_under_a_job_being_made(
    sessions: sessionmaker[Session], create: Create, file_id: str
) -> None:
    deleting = sessions()
    delete_file(deleting, DEFAULT_PROJECT, file_id)  # not committed yet
    outcome: list[str | ServiceError] = []

    def call() -> None:
        try:
            outcome.append(create())
        except InvalidRequest as error:
            outcome.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(timeout=0.3)
    waited = thread.is_alive()
    deleting.commit()
    deleting.close()
    thread.join()

    assert waited
    assert isinstance(outcome[0], InvalidRequest)
