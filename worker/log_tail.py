"""The end of a child's log, made fit for a user's eyes: short, without this machine's folders and without secrets.

A log quotes whatever a library said. So a folder without a short name of its own is not shown either, and whatever has
the value of a variable that is named like a secret is left out.
"""

import os
import re
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from service.settings import Settings
from worker.folder import AttemptFolder

_LINES = 20
_LINE_CHARACTERS = 300
_BYTES = 4_000
_SHORTEST_SECRET = 8  # shorter values are words such as "true"

_SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASSW|CREDENTIAL|(?:^|_)KEY|_URL$|_DSN$|AUTH", re.IGNORECASE
)
_SECRETS = (
    (re.compile(r"(?<=://)[^\s/@]+@"), "<secret>@"),  # a URL's user and password
    (
        re.compile(r"\b(?:hf_|sk-|gh[opsu]_|github_pat_|glpat-|AKIA)[A-Za-z0-9_-]{8,}"),
        "<secret>",
    ),
    (re.compile(r"\beyJ[\w-]+\.eyJ[\w-]+\.[\w-]*"), "<secret>"),  # a JSON web token
    # of an address that an object store signed: whoever has it may read until it expires
    (re.compile(r"(?i)([?&](?:[\w-]*signature|[\w-]*token|sig)=)[^\s&'\"]+"), r"\1<secret>"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), r"\1 <secret>"),
)
_OTHER_FOLDER = re.compile(r"(?:file://|(?<![\w/>.]))/(?!/)(?:[\w.+@%~-]+/)+")
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def public_log_tail(folder: AttemptFolder, settings: Settings) -> str:
    """Return the last lines of an attempt's log: at most 20 of 300 characters, 4,000 bytes; empty where there are none."""
    text = folder.log_tail()
    for secret in _secret_values():
        text = text.replace(secret, "<secret>")
    for pattern, word in _SECRETS:
        text = pattern.sub(word, text)
    for place, word in _short_names(folder, settings):
        text = re.sub(rf"{re.escape(place)}(?![\w-])", word, text)
    text = _OTHER_FOLDER.sub("<folder>/", text)
    lines = [_shown(line) for line in text.split("\n")]
    return _within_bytes([line for line in lines if line][-_LINES:])


def _secret_values() -> list[str]:
    """Of the variables that a child inherits, longest first: one may hold another."""
    variables = os.environ.items()  # noqa: TID251  (to keep them out of what is shown)
    found = {value for name, value in variables if _SECRET_NAME.search(name)}
    return sorted((one for one in found if len(one) >= _SHORTEST_SECRET), key=len, reverse=True)


def _short_names(folder: AttemptFolder, settings: Settings) -> list[tuple[str, str]]:
    """Return this machine's folders and what stands for them, the longest first: many lie within another."""
    named: list[tuple[str | Path, str]] = [
        (folder.path, "<attempt>"),
        (folder.path.parent, "<job>"),
        (settings.data_dir, "<data>"),
        (tempfile.gettempdir(), "<tmp>"),
        (Path(__file__).parents[1], "<nibble>"),
        *((place, "<python>") for place in _python_folders()),
        *_model_folders(folder),
        (Path.home(), "<home>"),
    ]
    names: dict[str, str] = {}
    for place, word in named:
        for spelling in (str(place), os.path.realpath(place)):
            if len(spelling) > 1:
                names.setdefault(spelling, word)
    return sorted(names.items(), key=lambda item: len(item[0]), reverse=True)


def _python_folders() -> Iterator[str]:
    yield from (sys.prefix, sys.base_prefix)
    yield from (sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def _model_folders(folder: AttemptFolder) -> Iterator[tuple[str, str]]:
    try:
        spec: dict[str, Any] = folder.read_spec()
        yield str(spec["model_cache"]), "<models>"
        if spec["model"]["path"] is not None:
            yield str(spec["model"]["path"]), "<model>"
    except (OSError, ValueError, LookupError, TypeError):
        return  # the attempt ended before it was written: nothing of it can be in the log


def _shown(line: str) -> str:
    """Of a line that a progress bar wrote over and over only what stood there last."""
    line = _CONTROL.sub("", line.rstrip("\r").rpartition("\r")[2]).rstrip()
    return line if len(line) <= _LINE_CHARACTERS else line[: _LINE_CHARACTERS - 1] + "…"


def _within_bytes(lines: list[str]) -> str:
    while lines and len("\n".join(lines).encode()) > _BYTES:
        lines = lines[1:]
    return "\n".join(lines)
