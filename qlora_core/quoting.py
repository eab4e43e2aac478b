"""Quotes in a message what a file or a caller says: a message must neither grow with it nor be broken by it."""

from __future__ import annotations

MOST_CHARACTERS = 200


def quoted(value: object, characters: int = MOST_CHARACTERS) -> str:
    """Give a value as a message can show it: on one line, printable, cut after ``characters``.

    A text is given without marks around it, everything else as ``repr`` does; what cannot be printed becomes its escape.
    """
    text = value if isinstance(value, str) else repr(value)
    cut = text if len(text) <= characters else f"{text[:characters]}…"
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in cut
    )


def shown(value: object) -> str:
    """Give a value as a message can show it, with marks around a text; what is too large for ``repr``, by its kind."""
    try:
        return quoted(repr(value))
    except (ValueError, RecursionError):
        return f"a very large {type(value).__name__}"
