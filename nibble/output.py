"""What a command prints: results on stdout (tables, or one JSON document with --json), the rest on stderr."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_CONTROL = {c: None for c in range(32) if chr(c) not in "\n\t"} | dict.fromkeys(range(127, 160))


class _Mode:
    json = False


def use_json(wanted: bool) -> None:
    """Choose, once per process, whether results are JSON."""
    _Mode.json = wanted


def wants_json() -> bool:
    """Whether this process was asked for --json."""
    return _Mode.json


@cache
def people() -> Console:
    """The console on stderr: progress, notes, errors."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


@cache
def results() -> Console:
    """The console on stdout."""
    return Console(highlight=False, soft_wrap=True)


def plain(text: str) -> str:
    """Text from elsewhere without control characters: a job's message must not steer a terminal."""
    return text.translate(_CONTROL)


def say(message: str, *, style: str = "") -> None:
    """Tell a person something, on stderr; markup in it is not interpreted."""
    people().print(Text(plain(message), style=style))


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document on stdout."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_result(text: str) -> None:
    """Print one line of a result on stdout."""
    results().print(Text(plain(text)))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str) -> None:
    """Print rows under headings; where there are none, say `empty` on stderr."""
    listed = [[Text(plain(_cell(value))) for value in row] for row in rows]
    if not listed:
        say(empty)
        return
    if not results().is_terminal:  # for cut, awk and grep: no padding to a width, no truncation
        for row in listed:
            sys.stdout.write("\t".join(cell.plain for cell in row) + "\n")
        sys.stdout.flush()
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in listed:
        table.add_row(*row)
    results().print(table)


def print_fields(fields: Iterable[tuple[str, object]]) -> None:
    """Print "name: value" lines, leaving out what is None."""
    shown = [(name, value) for name, value in fields if value is not None]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print_result(f"{name + ':':<{width + 1}} {_cell(value)}")


def local_time(unix_s: int | None) -> str | None:
    """A unix time as this machine's clock shows it, or None."""
    if unix_s is None:
        return None
    return datetime.fromtimestamp(unix_s).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def size(count_bytes: float | None) -> str | None:
    """A number of bytes for people: "1.2 GiB"; None for None."""
    if count_bytes is None:
        return None
    value = float(count_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _cell(value: object) -> str:
    return "-" if value is None else str(value)
