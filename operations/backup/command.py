"""`nibble dump` and `nibble restore`."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import SecretStr
from sqlalchemy.exc import SQLAlchemyError

from nibble import output
from nibble.commands.options import Json
from nibble.endings import Ending, ExitCode, guarded, refused
from operations import migrate
from operations.backup import dump as dumping
from operations.backup import restore as restoring
from operations.backup.manifest import DumpInvalid, Manifest
from operations.embedded import postgres
from operations.embedded.processes import EmbeddedError
from operations.running import with_running_service
from operations.up import DataDir
from service.errors import ServiceError
from service.settings import Settings, SettingsInvalid, read_settings
from service.storage import StorageUrlInvalid


@guarded
def dump(
    folder: Annotated[Path, typer.Argument(help="A new folder for the dump.")],
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Save the database and all blobs, as they are at one moment, while the service runs."""
    settings = with_running_service(_settings(data_dir))
    if settings.database_url is None:
        raise refused(
            f"no service runs over {settings.data_dir}: start it with `nibble up`, name its folder with --data-dir, "
            "or set NIBBLE_DATABASE_URL."
        )
    try:
        manifest = dumping.dump(settings, folder)
    except (dumping.DumpFailed, migrate.MigrationError) as error:
        raise refused(str(error)) from error
    except (ServiceError, StorageUrlInvalid) as error:
        raise Ending(ExitCode.FAILED, str(error)) from error
    except SQLAlchemyError as error:
        raise Ending(ExitCode.UNREACHABLE, f"the database does not answer: {error}") from error
    _tell("Dumped", manifest, folder, json=json)


@guarded
def restore(
    folder: Annotated[Path, typer.Argument(help="What `nibble dump` made.")],
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Put a dump into a new data folder, or into the empty database and storage that the settings name."""
    settings = _settings(data_dir)
    try:
        if settings.database_url is None:
            manifest = _restore_here(settings, folder)
        else:
            manifest = restoring.restore(settings, folder)
    except (DumpInvalid, restoring.NotEmpty, migrate.MigrationError, EmbeddedError) as error:
        raise refused(str(error)) from error
    except (ServiceError, StorageUrlInvalid) as error:
        raise Ending(ExitCode.FAILED, str(error)) from error
    except SQLAlchemyError as error:
        raise Ending(ExitCode.UNREACHABLE, f"the database does not answer: {error}") from error
    _tell("Restored", manifest, folder, json=json)


def _restore_here(settings: Settings, folder: Path) -> Manifest:
    """Restore into a server of our own, started over the data folder for that long."""
    restoring.check(folder)  # before a server is made for it
    data_dir = settings.data_dir
    if data_dir.exists() and any(data_dir.iterdir()):
        raise restoring.NotEmpty(f"{data_dir} is not empty: name a new folder with --data-dir")
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    server = postgres.start(data_dir)
    try:
        url = SecretStr(server.url)
        return restoring.restore(settings.model_copy(update={"database_url": url}), folder)
    finally:
        server.stop()


def _settings(data_dir: Path | None) -> Settings:
    try:
        return read_settings(data_dir=data_dir)
    except SettingsInvalid as error:
        raise refused(str(error)) from error


def _tell(what: str, manifest: Manifest, folder: Path, *, json: bool) -> None:
    size = sum(blob.bytes for blob in manifest.blobs)
    if json:
        output.print_json(
            {
                "object": "dump",
                "folder": str(folder),
                "revision": manifest.revision,
                "tables": len(manifest.tables),
                "blobs": len(manifest.blobs),
                "blob_bytes": size,
            }
        )
        return
    output.say(
        f"{what} {len(manifest.tables)} tables and {len(manifest.blobs)} blobs ({output.size(size)})."
    )
