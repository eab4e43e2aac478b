"""A file of results that grows run by run, so that a bench that was cut off goes on where it was."""

import json
import os
from pathlib import Path
from typing import Any


class OtherSettings(Exception):
    """The file has results of other settings; the message is a sentence."""


def open_kept(file: Path, about: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """Give what a file has, or the beginning of one: ``about``, ``asked`` and a list "runs".

    Args:
        file: that may be there.
        about: what the measurement is made on, kept from the file's first run.
        asked: the settings, which a file has to share.

    Raises:
        OtherSettings: the file's runs are of others.
    """
    kept = json.loads(file.read_text()) if file.exists() else {"runs": []}
    if {name: kept.get(name, value) for name, value in asked.items()} != asked:
        raise OtherSettings(f"{file} is of other settings")
    return about | kept | asked


def keep(kept: dict[str, Any], file: Path) -> None:
    """Write beside the file and rename: a bench that is cut off leaves what it had."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    beside.write_text(json.dumps(kept) + "\n")
    beside.replace(file)
