"""The migrations, on a real server: up from empty, down again, and equal to `service.tables`."""

from pathlib import Path

import pytest
from sqlalchemy import create_engine, inspect, text

from operations import migrate
from service.tables import DEFAULT_PROJECT, Base

_SHAPE = {
    "columns": """
        SELECT table_name, column_name, data_type, is_nullable, column_default
        FROM information_schema.columns WHERE table_schema = 'public'""",
    "constraints": """
        SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid)
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace""",
    "indexes": "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
}


def _shape(url: str) -> dict[str, set[tuple[object, ...]]]:
    """What PostgreSQL itself says of the schema: also predicates and checks, which Alembic does not compare."""
    engine = create_engine(url)
    with engine.connect() as connection:
        shape = {
            kind: {
                tuple(row)
                for row in connection.execute(text(query))
                if "alembic_version" not in row[0]
            }
            for kind, query in _SHAPE.items()
        }
    engine.dispose()
    return shape


def test_the_migrations_make_exactly_the_tables_that_the_code_declares(
    database_url: str, empty_database_url: str
) -> None:
    engine = create_engine(empty_database_url)
    Base.metadata.create_all(engine)
    engine.dispose()

    migrated = _shape(database_url)
    declared = _shape(empty_database_url)

    for kind, expected in declared.items():
        assert migrated[kind] == expected, (
            f"{kind} of migrations/versions and service/tables.py differ; until 0.1.0 is released, "
            "edit the first migration in place"
        )


def test_alembic_finds_no_drift(database_url: str) -> None:
    migrate.check(database_url)


def test_a_drift_is_found(database_url: str) -> None:
    engine = create_engine(database_url)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE jobs DROP COLUMN priority"))
    engine.dispose()

    with pytest.raises(migrate.MigrationError, match="priority"):
        migrate.check(database_url)


def test_the_default_project_is_there_from_the_start(database_url: str) -> None:
    engine = create_engine(database_url)
    with engine.connect() as connection:
        projects = connection.execute(text("SELECT id, weight FROM projects")).all()
    engine.dispose()

    assert [tuple(row) for row in projects] == [(DEFAULT_PROJECT, 1)]


def test_down_leaves_nothing_and_up_again_works(database_url: str) -> None:
    before = _shape(database_url)

    migrate.downgrade(database_url)

    engine = create_engine(database_url)
    assert set(inspect(engine).get_table_names()) == {"alembic_version"}
    engine.dispose()
    migrate.upgrade(database_url)
    assert _shape(database_url) == before


def test_up_twice_is_up_once(database_url: str) -> None:
    before = _shape(database_url)

    migrate.upgrade(database_url)

    assert _shape(database_url) == before


def test_it_does_not_matter_where_one_stands(
    empty_database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    migrate.upgrade(empty_database_url)

    migrate.check(empty_database_url)


def test_a_server_that_is_not_there_is_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(migrate.MigrationError, match="does not answer"):
        migrate.upgrade(f"postgresql://nibble@/nibble?host={tmp_path}")


def test_a_schema_of_a_newer_version_is_refused(database_url: str) -> None:
    engine = create_engine(database_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'from_the_future'"))
    engine.dispose()

    with pytest.raises(migrate.MigrationError, match="from_the_future"):
        migrate.upgrade(database_url)
