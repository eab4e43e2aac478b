"""What a database's errors tell: they end in logs."""

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DataError


def test_an_error_tells_the_statement_and_not_what_was_in_it(engine: Engine) -> None:
    statement = text("SELECT 1 / 0 WHERE length(:content) > 0")

    with pytest.raises(DataError) as caught, engine.connect() as connection:
        connection.execute(statement, {"content": "a line of somebody's training file"})

    assert "SELECT 1 / 0" in str(caught.value)
    assert "training file" not in str(caught.value)
