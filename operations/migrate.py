"""Bring the database to the newest schema, and back: Alembic over `migrations/`, from any working folder.

python -m operations.migrate        # the database of NIBBLE_DATABASE_URL
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from pydantic import SecretStr
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from service.db import DatabaseUrlMissing, connect
from service.settings import Settings, SettingsInvalid, read_settings


class MigrationError(RuntimeError):
    """The database could not be brought to the schema this version needs; the message says why."""


def upgrade(url: str, revision: str = "head") -> None:
    """Apply every migration up to `revision`; nothing happens where they are applied already.

    Raises:
        MigrationError: the server does not answer, or its schema was made by a newer version.
    """
    _run(url, lambda config: command.upgrade(config, revision))


def downgrade(url: str, revision: str = "base") -> None:
    """Take migrations back down to `revision`. What their tables held is lost.

    Raises:
        MigrationError: the server does not answer.
    """
    _run(url, lambda config: command.downgrade(config, revision))


def check(url: str) -> None:
    """Compare the database with `service.tables`.

    Raises:
        MigrationError: they differ; the message names the differences.
    """
    _run(url, command.check)


@dataclass(frozen=True)
class Standing:
    """Where a database stands: its migration (None: without any), and the newest one."""

    current: str | None
    newest: str | None
    is_known: bool
    """Whether this version has the database's migration."""

    @property
    def is_newest(self) -> bool:
        """Whether nothing is to be done."""
        return self.current == self.newest


def standing(engine: Engine) -> Standing:
    """Compare the migration that a database is at with the newest one; raises SQLAlchemy's errors."""
    with engine.connect() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
    scripts = ScriptDirectory.from_config(_config(engine))
    known = {script.revision for script in scripts.walk_revisions()}
    return Standing(current, scripts.get_current_head(), current is None or current in known)


def _run(url: str, action: Callable[[Config], None]) -> None:
    engine = connect(Settings(database_url=SecretStr(url)), pool_size=1)
    try:
        action(_config(engine))
    except OperationalError as error:
        raise MigrationError(f"the database does not answer: {error.orig}") from error
    except CommandError as error:
        raise MigrationError(f"the database cannot be migrated: {error}") from error
    finally:
        engine.dispose()


def _config(engine: Engine) -> Config:
    spec = find_spec("migrations")
    if spec is None or spec.origin is None:
        raise MigrationError("the package migrations is missing: install nibble[server] again")
    config = Config()
    config.set_main_option("script_location", str(Path(spec.origin).parent).replace("%", "%%"))
    config.attributes["engine"] = engine
    return config


def _main() -> None:
    settings = read_settings()
    if settings.database_url is None:
        raise DatabaseUrlMissing(
            "NIBBLE_DATABASE_URL is not set: set it to the database to migrate"
        )
    upgrade(settings.database_url.get_secret_value())
    print("The database is at the newest schema.")


if __name__ == "__main__":
    try:
        _main()
    except (SettingsInvalid, DatabaseUrlMissing, MigrationError) as error:
        sys.exit(str(error))
