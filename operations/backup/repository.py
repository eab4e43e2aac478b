"""SQL of dumps: whole tables out and in, and the blobs that rows name."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import psycopg
from psycopg import sql
from sqlalchemy import Connection, select, text

from service.files.repository import BLOB_GONE
from service.tables import Adapter, Base, File


def tables() -> list[tuple[str, list[str]]]:
    """Return the tables and their columns, those that others refer to first."""
    return [
        (table.name, [column.name for column in table.columns])
        for table in Base.metadata.sorted_tables
    ]


def rows_of(connection: Connection, table: str, columns: Sequence[str]) -> Iterator[bytes]:
    """Give a table's rows in COPY's text format, as the connection's transaction sees them."""
    statement = sql.SQL("COPY {} ({}) TO STDOUT").format(sql.Identifier(table), _list(columns))
    with _driver(connection).cursor().copy(statement) as copy:
        for piece in copy:
            yield bytes(piece)


def clear(connection: Connection, table: str) -> None:
    """Remove the rows that the migrations put into a table."""
    _driver(connection).execute(sql.SQL("DELETE FROM {}").format(sql.Identifier(table)))


def fill(connection: Connection, table: str, columns: Sequence[str], rows: Iterable[bytes]) -> None:
    """Put rows of COPY's text format into a table, and let its numbering go on after them."""
    driver, name = _driver(connection), sql.Identifier(table)
    statement = sql.SQL("COPY {} ({}) FROM STDIN").format(name, _list(columns))
    with driver.cursor().copy(statement) as copy:
        for piece in rows:
            copy.write(piece)
    for column in columns:
        found = driver.execute("SELECT pg_get_serial_sequence(%s, %s)", [table, column]).fetchone()
        if found is not None and found[0] is not None:
            next_number = sql.SQL(
                "SELECT setval({}, (SELECT coalesce(max({}), 0) + 1 FROM {}), false)"
            )
            driver.execute(next_number.format(sql.Literal(found[0]), sql.Identifier(column), name))


def blobs(connection: Connection) -> list[tuple[str, int, str]]:
    """Return key, bytes and SHA-256 of every blob that a row names."""
    files = select(File.blob_key, File.bytes, File.sha256).where(File.blob_key != BLOB_GONE)
    found: dict[str, tuple[str, int, str]] = {}
    for row in connection.execute(files):
        found[row.blob_key] = (row.blob_key, row.bytes, row.sha256)
    for (listed,) in connection.execute(select(Adapter.files)):
        for file in cast("list[dict[str, Any]]", listed):
            found[file["blob_key"]] = (file["blob_key"], file["bytes"], file["sha256"])
    return sorted(found.values())


def is_empty(connection: Connection) -> bool:
    """Say whether the database has no table yet."""
    statement = text("SELECT count(*) FROM pg_tables WHERE schemaname = current_schema()")
    return connection.scalar(statement) == 0


def _list(columns: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(sql.Identifier(column) for column in columns)


def _driver(connection: Connection) -> "psycopg.Connection[Any]":
    connection.execute(text("SELECT 1"))  # SQLAlchemy opens the transaction that both are in
    return cast("psycopg.Connection[Any]", connection.connection.driver_connection)
