"""Outlasting a database that does not answer, in whatever form that shows."""

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DataError, OperationalError

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


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("SELECT 1 / 0", DataError),
        ("SELECT repeat('x', 2000000000)", OperationalError),  # 54000: over a limit
        ("DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '08P01'; END $$", OperationalError),
    ],
)
def test_what_the_database_refuses_is_not_tried_again(
    settings: Settings, statement: str, error: type[Exception]
) -> None:
    assert settings.database_url is not None
    engine = create_engine(settings.database_url.get_secret_value())

    with pytest.raises(error), engine.connect() as connection:
        outlast(lambda: connection.execute(text(statement)), wait=_never_again)
    engine.dispose()


@pytest.mark.parametrize(
    "sqlstate", ["08006", "25006", "40001", "53100", "53300", "55P03", "57014", "57P01"]
)
def test_what_passes_is_outlasted(settings: Settings, sqlstate: str) -> None:
    assert settings.database_url is not None
    engine = create_engine(settings.database_url.get_secret_value())
    refuse = f"DO $$ BEGIN RAISE EXCEPTION 'not now' USING ERRCODE = '{sqlstate}'; END $$"
    statements = [refuse, "SELECT 7"]

    def ask() -> object:
        with engine.connect() as connection:
            return connection.execute(text(statements.pop(0))).scalar_one()

    answer = outlast(ask, wait=lambda _: False)
    engine.dispose()

    assert answer == 7


def _never_again(_: float) -> bool:
    pytest.fail("it is tried again")
