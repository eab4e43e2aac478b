"""Making a dump while the service runs: the rows of one snapshot, and every blob that they name.

Removal of blobs is held off before the snapshot is taken and until the last blob is copied. New blobs may come meanwhile; the
snapshot does not name them.
"""

import hashlib
import shutil
from pathlib import Path

from sqlalchemy import Connection, Engine

from operations import migrate
from operations.backup import repository
from operations.backup.manifest import DumpedBlob, DumpedTable, Manifest
from service import db
from service.removal.repository import hold_off_removal
from service.settings import Settings
from service.storage import BlobMissing, Storage

_PATIENCE_S = 3600.0
"""For a large table, and for a removal that is at work."""


class DumpFailed(RuntimeError):
    """No dump was made; the message says why."""


def dump(settings: Settings, folder: Path) -> Manifest:
    """Write a dump to `folder`, which must not be there yet; it is there whole or not at all.

    Raises:
        DumpFailed: the folder exists, a blob is missing or is not what its row says, or the schema is not the newest.
        OSError, SQLAlchemyError, StorageFull, Unavailable: the disk, the database or the storage.
    """
    if folder.exists():
        raise DumpFailed(f"{folder} is there already: name a new folder")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "tables").mkdir(parents=True, mode=0o700)
    partial.chmod(0o700)  # rows hold what teams trained on
    engine = db.connect(settings, pool_size=2, patience_s=_PATIENCE_S)
    try:
        manifest = _write(engine, Storage.open(settings), partial)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        engine.dispose()
    return manifest


def _write(engine: Engine, storage: Storage, folder: Path) -> Manifest:
    standing = migrate.standing(engine)
    if standing.current is None or not standing.is_newest:
        raise DumpFailed("the database is not at the newest schema: `nibble doctor` says more")
    snapshots = engine.execution_options(isolation_level="REPEATABLE READ")
    with engine.connect() as held:
        hold_off_removal(held)
        with snapshots.connect() as connection:
            tables = [
                _dump_table(connection, name, columns, folder / "tables")
                for name, columns in repository.tables()
            ]
            named = repository.blobs(connection)
        blobs = [_dump_blob(storage, *blob, folder / "blobs") for blob in named]
        # The lock is the server's session's: a connection that goes back into the pool would keep it.
        held.invalidate()
    manifest = Manifest(standing.current, tables, blobs)
    manifest.write(folder)
    return manifest


def _dump_table(connection: Connection, name: str, columns: list[str], folder: Path) -> DumpedTable:
    digest = hashlib.sha256()
    with (folder / f"{name}.copy").open("wb") as file:
        for piece in repository.rows_of(connection, name, columns):
            digest.update(piece)
            file.write(piece)
    return DumpedTable(name, columns, digest.hexdigest())


def _dump_blob(storage: Storage, key: str, size: int, sha256: str, folder: Path) -> DumpedBlob:
    path = folder / key
    try:
        storage.fetch(key, path)
    except BlobMissing as error:
        raise DumpFailed(f"the blob {key}, which a row names, is not in the storage") from error
    if path.stat().st_size != size or sha256_of(path) != sha256:
        raise DumpFailed(f"the blob {key} is not what its row says: the storage is damaged")
    return DumpedBlob(key, size, sha256)


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
