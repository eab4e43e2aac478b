"""Putting a dump into an empty database and an empty storage.

Everything in the dump is held to its SHA-256 before anything is written. Blobs come first, then all rows in one transaction: a
killed restore leaves tables without rows, and the next one has to be given another database and storage.
"""

from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Engine

from operations import migrate
from operations.backup import repository
from operations.backup.dump import sha256_of
from operations.backup.manifest import DumpInvalid, Manifest
from service import db
from service.settings import Settings
from service.storage import BlobMissing, Storage

_PATIENCE_S = 3600.0
_PIECE_BYTES = 1 << 20


class NotEmpty(RuntimeError):
    """The database or the storage has something in it already; the message says which."""


def check(folder: Path) -> Manifest:
    """Hold every file of a dump to its SHA-256, and return what is in it.

    Raises:
        DumpInvalid: a file is missing or is not what the manifest says.
    """
    manifest = Manifest.read(folder)
    files = [(folder / "tables" / f"{table.name}.copy", table.sha256) for table in manifest.tables]
    files += [(folder / "blobs" / blob.key, blob.sha256) for blob in manifest.blobs]
    for path, sha256 in files:
        if not path.is_file():
            raise DumpInvalid(f"the dump lacks {path.relative_to(folder)}")
        if sha256_of(path) != sha256:
            raise DumpInvalid(f"{path.relative_to(folder)} was changed after the dump was made")
    return manifest


def restore(settings: Settings, folder: Path) -> Manifest:
    """Put a dump into the settings' database and storage, and bring it to the newest schema.

    Raises:
        DumpInvalid: the dump is not whole.
        NotEmpty: there is something already.
        MigrationError: the dump was made by a newer version.
        SQLAlchemyError, StorageFull, Unavailable: the database or the storage.
    """
    manifest = check(folder)
    if settings.database_url is None:
        raise NotEmpty("no database is configured")
    url = settings.database_url.get_secret_value()
    engine = db.connect(settings, pool_size=1, patience_s=_PATIENCE_S)
    try:
        with engine.connect() as connection:
            if not repository.is_empty(connection):
                raise NotEmpty("the database has tables already: name an empty one")
        storage = Storage.open(settings)
        for blob in manifest.blobs:
            if _is_there(storage, blob.key):
                raise NotEmpty(f"the storage has {blob.key} already: name an empty one")
        migrate.upgrade(url, manifest.revision)
        for blob in manifest.blobs:
            storage.put_file(blob.key, folder / "blobs" / blob.key)
        _fill(engine, manifest, folder / "tables")
        migrate.upgrade(url)
    finally:
        engine.dispose()
    return manifest


def _fill(engine: Engine, manifest: Manifest, folder: Path) -> None:
    with engine.begin() as connection:
        for table in reversed(manifest.tables):
            repository.clear(connection, table.name)
        for table in manifest.tables:
            rows = _pieces(folder / f"{table.name}.copy")
            repository.fill(connection, table.name, table.columns, rows)


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece


def _is_there(storage: Storage, key: str) -> bool:
    try:
        storage.size(key)
    except BlobMissing:
        return False
    return True
