"""What is in a dump: `manifest.json`, written last, so that a folder without it is none."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
NAME = "manifest.json"


class DumpInvalid(ValueError):
    """A folder is no dump, or not one that this version reads; the message says which and why."""


@dataclass(frozen=True)
class DumpedTable:
    """A table: its columns in the order of its rows, and the SHA-256 of `tables/NAME.copy`."""

    name: str
    columns: list[str]
    sha256: str


@dataclass(frozen=True)
class DumpedBlob:
    """A blob, in `blobs/KEY`."""

    key: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A dump's contents. `revision`: the migration that its tables are at."""

    revision: str
    tables: list[DumpedTable]
    blobs: list[DumpedBlob]

    def write(self, folder: Path) -> None:
        """Put it into a dump."""
        document = {"format": FORMAT, **asdict(self)}
        (folder / NAME).write_text(json.dumps(document, indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Return a dump's.

        Raises:
            DumpInvalid: there is none, or it is of another format.
        """
        try:
            document: dict[str, Any] = json.loads((folder / NAME).read_text("utf-8"))
            if document["format"] != FORMAT:
                raise DumpInvalid(f"{folder} is a dump of another format: {document['format']}")
            return cls(
                revision=document["revision"],
                tables=[DumpedTable(**table) for table in document["tables"]],
                blobs=[DumpedBlob(**blob) for blob in document["blobs"]],
            )
        except (OSError, UnicodeDecodeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise DumpInvalid(
                f"{folder} is no whole dump: its {NAME} is missing or damaged"
            ) from error
