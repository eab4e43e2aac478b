"""A PostgreSQL that hangs: it keeps its connections open and says nothing."""

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from operations.embedded import postgres
from service import db
from service.connection import ServerSilent
from service.settings import Settings
from tests.stopped import stopped


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Little patience."""
    return settings.model_copy(update={"database_patience_s": 0.5})


def test_a_statement_that_hears_nothing_raises_and_the_next_one_connects_anew(
    settings: Settings, postgres_server: postgres.Postgres
) -> None:
    engine = db.connect(settings)
    with engine.connect() as connection:
        with stopped(postgres_server), pytest.raises(OperationalError) as caught:
            connection.execute(text("SELECT 1"))
        was_invalidated = connection.invalidated

    with engine.connect() as connection:
        answer = connection.execute(text("SELECT 7")).scalar_one()
    engine.dispose()

    assert isinstance(caught.value.orig, ServerSilent)
    assert (was_invalidated, answer) == (True, 7)


def test_a_long_answer_is_waited_for_as_long_as_it_comes(settings: Settings) -> None:
    engine = db.connect(settings)
    rows = "SELECT pg_sleep(0.1), repeat('x', 100000) FROM generate_series(1, 20)"

    with engine.connect() as connection:  # two seconds in all, a tenth of one at a time
        count = len(connection.execute(text(rows)).all())
    engine.dispose()

    assert count == 20


def test_a_server_that_never_takes_a_connection_is_given_up(
    settings: Settings, postgres_server: postgres.Postgres
) -> None:
    engine = db.connect(settings, pool_size=0)

    with stopped(postgres_server), pytest.raises(OperationalError):
        engine.connect()
    engine.dispose()
