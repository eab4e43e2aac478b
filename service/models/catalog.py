"""The catalog of base models: `models.toml`.

    [models.tiny-llama]
    path = "examples/tiny-llama"          # a folder, relative to the file

    [models.llama-3-8b]
    hub = "organization/name"             # or a repository on the hub, and which commit of it
    revision = "0123abc…"

An id has neither ":" nor "/": clients cut `ft:{base}:…` there.
"""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HUB = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_FIELDS = {"path", "hub", "revision"}


class CatalogError(ValueError):
    """The catalog cannot be used; the message names the file and the entry."""


@dataclass(frozen=True)
class BaseModel:
    """A model that jobs can start from: a local folder, or a commit of a hub repository."""

    id: str
    path: Path | None
    hub: str | None
    revision: str | None
    created: int  # unix seconds: when the catalog was last written


class Catalog:
    """The base models there are."""

    def __init__(self, models: dict[str, BaseModel]) -> None:
        self._models = models

    @classmethod
    def load(cls, path: Path) -> "Catalog":
        """Read `models.toml`.

        Raises:
            CatalogError: the file is missing or unreadable, or an entry is wrong.
        """
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
            created = int(path.stat().st_mtime)
        except FileNotFoundError:
            raise CatalogError(
                f"{path}: there is no such file; write one, or set NIBBLE_MODELS_FILE"
            ) from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise CatalogError(f"{path}: {error}") from error
        entries = document.get("models")
        if not isinstance(entries, dict) or not entries:
            raise CatalogError(f"{path}: no [models.<id>] entry")
        unknown = sorted(document.keys() - {"models"})
        if unknown:
            raise CatalogError(f"{path}: unknown entry {unknown[0]!r}; models are [models.<id>]")
        named = cast("dict[str, Any]", entries)
        return cls({id_: _model(path, id_, entry, created) for id_, entry in named.items()})

    def get(self, model_id: str) -> BaseModel | None:
        """Return the model of this id, or None."""
        return self._models.get(model_id)

    def all(self) -> list[BaseModel]:
        """Return every model, in the file's order."""
        return list(self._models.values())


def _model(file: Path, id_: str, entry: object, created: int) -> BaseModel:
    where = f"{file}: [models.{id_}]"
    if not _ID.fullmatch(id_):
        raise CatalogError(
            f"{where}: an id is 1 to 100 letters, digits, '.', '_' or '-' (no ':' nor '/'), and"
            ' a dot needs quotes: [models."qwen-2.5"]'
        )
    if not isinstance(entry, dict):
        raise CatalogError(f"{where}: is no table; write [models.{id_}] and path or hub under it")
    fields = cast("dict[str, object]", entry)
    for name, value in fields.items():
        if name not in _FIELDS:
            raise CatalogError(f"{where}: unknown field {name!r}; there are path, hub, revision")
        if not isinstance(value, str) or not value.strip():
            raise CatalogError(f"{where}: {name} must be a string that is not empty")
    text = cast("dict[str, str]", fields)
    folder, hub, revision = text.get("path"), text.get("hub"), text.get("revision")
    if (folder is None) == (hub is None):
        raise CatalogError(f"{where}: give either path (a folder) or hub (organization/name)")
    if hub is not None and not _HUB.fullmatch(hub):
        raise CatalogError(f"{where}: hub {hub!r} is not organization/name")
    if hub is not None and revision is None:
        raise CatalogError(f"{where}: hub needs revision, the commit to use")
    if hub is None and revision is not None:
        raise CatalogError(f"{where}: revision goes with hub, not with path")
    path = None if folder is None else (file.parent / Path(folder).expanduser()).absolute()
    return BaseModel(id=id_, path=path, hub=hub, revision=revision, created=created)
