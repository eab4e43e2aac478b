"""Server-sent events out of a body's bytes (the WHATWG HTML standard, section 9.2).

Lines end at CR, LF or CRLF and nowhere else: `str.splitlines`, which HTTP libraries use, would also split inside a
message that holds U+2028 or U+0085.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_LINE_END = re.compile(rb"\r\n|\n|\r")


@dataclass(frozen=True)
class ServerEvent:
    """One event; `id` is the last one that the stream named so far."""

    id: str | None
    event: str
    data: str


def parse(chunks: Iterable[bytes]) -> Iterator[ServerEvent | None]:
    """Yield each event when its blank line has come, and None for each comment (a sign of life)."""
    last_id: str | None = None
    kind, data = "", list[str]()
    for line in _lines(chunks):
        if not line:
            if data:
                yield ServerEvent(last_id, kind or "message", "\n".join(data))
            kind, data = "", []
            continue
        if line.startswith(b":"):
            yield None
            continue
        name, _, raw = line.partition(b":")
        value = raw.removeprefix(b" ").decode("utf-8", "replace")
        if name == b"data":
            data.append(value)
        elif name == b"event":
            kind = value
        elif name == b"id" and "\0" not in value:
            last_id = value


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Whole lines, without their ends. A CR that ends a chunk waits for the LF that may follow it."""
    pending = b""
    for chunk in chunks:
        pending += chunk
        held = b"\r" if pending.endswith(b"\r") else b""
        *whole, pending = _LINE_END.split(pending.removesuffix(held) if held else pending)
        pending += held
        yield from whole
