"""Downloads in parts: what `Range`, `If-Range` and `If-None-Match` ask for (RFC 9110, sections 13 and 14).

One range per request is served; a list of ranges, or a unit we do not know, is answered with the whole.
"""

import re
from dataclasses import dataclass
from typing import Literal

_ONE_RANGE = re.compile(r"bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*", re.IGNORECASE)
_MAX_DIGITS = 19


@dataclass(frozen=True)
class Span:
    """The bytes [start, end) to send, of `size`."""

    start: int
    end: int
    size: int

    @property
    def content_range(self) -> str:
        """The `Content-Range` header of a part."""
        return f"bytes {self.start}-{self.end - 1}/{self.size}"


def not_modified(etag: str, if_none_match: str | None) -> bool:
    """Whether the client already has what `etag` stands for."""
    if if_none_match is None:
        return False
    known = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return "*" in known or etag in known


def wanted(
    size: int, etag: str, range_: str | None, if_range: str | None
) -> Span | Literal["all", "unsatisfiable"]:
    """Return what to send of `size` bytes.

    Args:
        size: of the whole.
        etag: of the whole, strong.
        range_: the `Range` header.
        if_range: the `If-Range` header: anything but this very tag makes the range void.
    """
    if range_ is None or (if_range is not None and if_range.strip() != etag):
        return "all"
    match = _ONE_RANGE.fullmatch(range_.strip())
    if match is None or not any(match.groups()) or max(map(len, match.groups())) > _MAX_DIGITS:
        return "all"
    first, last = match.groups()
    if not first:  # the last n bytes
        start, end = max(size - int(last), 0), size
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < int(first):
            return "all"  # malformed, which is to be ignored
    return Span(start, end, size) if start < end else "unsatisfiable"
