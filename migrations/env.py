"""How Alembic reaches the database: over the connection it is given, else over the configured URL."""

from alembic import context
from sqlalchemy import Connection, Engine, text

from service.db import connect
from service.settings import Settings
from service.tables import Base

_ONE_AT_A_TIME = 0x6E6962626C65  # "nibble": the number of the advisory lock


def _migrate(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        compare_type=True,
        compare_server_default=True,
    )
    with context.begin_transaction():
        # Two that start at once: the second waits here, then finds nothing left to do.
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ONE_AT_A_TIME})
        context.run_migrations()


def _main() -> None:
    if context.is_offline_mode():
        raise SystemExit("migrations are applied over a connection; --sql is not supported")
    engine: Engine = context.config.attributes.get("engine") or connect(Settings())
    with engine.connect() as connection:
        _migrate(connection)
        connection.commit()


_main()
