"""Outlasting a database that does not answer, in whatever form that shows."""

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DataError

from service.settings import Settings
from worker.context import GivenUp, outlast


def test_connections_that_are_all_stuck_are_an_outage_like_any_other(settings: Settings) -> None:
    assert settings.database_url is not None
    url = settings.database_url.get_secret_value()
    engine = create_engine(url, pool_size=1, max_overflow=0, pool_timeout=0.05)
    stuck = engine.connect()
    pauses: list[float] = []

    def wait(pause_s: float) -> bool:
        pauses.append(pause_s)
        stuck.close()  # the server answers again
        return False

    def ask() -> int:
        with engine.connect() as connection:
            return connection.execute(text("SELECT 7")).scalar_one()

    answer = outlast(ask, wait=wait)
    engine.dispose()

    assert (answer, len(pauses)) == (7, 1)


def test_it_ends_when_there_is_no_more_time() -> None:
    engine = create_engine("postgresql+psycopg://nobody@127.0.0.1:1/nothing")

    with pytest.raises(GivenUp):
        outlast(engine.connect, wait=lambda _: True)


def test_what_the_database_refuses_is_not_tried_again(settings: Settings) -> None:
    assert settings.database_url is not None
    engine = create_engine(settings.database_url.get_secret_value())

    with pytest.raises(DataError), engine.connect() as connection:
        outlast(lambda: connection.execute(text("SELECT 1 / 0")), wait=lambda _: False)
    engine.dispose()
