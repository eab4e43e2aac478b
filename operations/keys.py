"""`nibble keys`: API keys, made by whoever can reach the service's database."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated

import typer
from pydantic import SecretStr
from sqlalchemy.exc import OperationalError, ProgrammingError
from sqlalchemy.orm import Session

from nibble import output
from nibble.commands.options import Json
from nibble.endings import Ending, ExitCode, guarded, refused
from operations.embedded import postgres
from operations.up import DataDir
from service import clock, db
from service.errors import ServiceError
from service.keys.actions import create_key, revoke_key
from service.settings import SettingsInvalid, read_settings
from service.tables import DEFAULT_PROJECT

app = typer.Typer(help="API keys.", no_args_is_help=True)


@app.command()
@guarded
def create(
    name: Annotated[str, typer.Argument(help="Whose it is or what it is for.")],
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Make an API key and print it; it is shown now and never again."""
    with _transaction(data_dir) as session:
        key, secret = create_key(session, DEFAULT_PROJECT, name)
        document = {
            "object": "api_key",
            "id": key.id,
            "name": key.name,
            "created_at": clock.unix(key.created_at),
            "secret": secret,
        }
    if json:
        output.print_json(document)
        return
    output.say(f"Made {document['id']}. Keep the key: it is not shown again.")
    output.print_result(secret)


@app.command()
@guarded
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="KEY-ID")],
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Refuse a key from now on."""
    with _transaction(data_dir) as session:
        revoke_key(session, DEFAULT_PROJECT, key_id)
    output.say(f"Revoked {key_id}.")
    if json:
        output.print_json({"object": "api_key", "id": key_id, "revoked": True})


@contextmanager
def _transaction(data_dir: DataDir) -> Generator[Session]:
    """One transaction over the database of NIBBLE_DATABASE_URL, or of the service that runs over the data folder."""
    try:
        settings = read_settings(data_dir=data_dir)
    except SettingsInvalid as error:
        raise refused(str(error)) from error
    if settings.database_url is None:
        url = postgres.running_url(settings.data_dir)
        if url is None:
            raise refused(
                f"no service runs over {settings.data_dir}: start it with `nibble up`, name its folder "
                "with --data-dir, or set NIBBLE_DATABASE_URL."
            )
        settings = settings.model_copy(update={"database_url": SecretStr(url)})
    engine = db.connect(settings, pool_size=1)
    try:
        with db.transaction(db.sessions(engine)) as session:
            yield session
    except ServiceError as error:
        raise refused(error.message) from error
    except OperationalError as error:
        raise Ending(ExitCode.UNREACHABLE, f"the database does not answer: {error.orig}") from error
    except ProgrammingError as error:
        raise refused(f"this database is not at the newest schema: {error.orig}") from error
    finally:
        engine.dispose()
