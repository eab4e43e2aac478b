"""What a training run says, made fit for PostgreSQL and for JSON.

A run may report a loss that is not a number, or a model's answer with a NUL in it. Its story must go on all the same,
so such things are replaced: a number that is not finite by null, a character that is not text by U+FFFD.
"""

import math
from typing import Any, cast

MAX_MESSAGE_CHARACTERS = 20_000


def storable_text(text: str) -> str:
    """Return a message without what is not text, cut at 20,000 characters."""
    text = _text(text)
    if len(text) > MAX_MESSAGE_CHARACTERS:
        return text[: MAX_MESSAGE_CHARACTERS - 1] + "…"
    return text


def storable(data: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return an event's data with every value one that JSON and the database can hold."""
    return None if data is None else cast("dict[str, Any]", _value(data))


def _value(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, dict):
        pairs = cast("dict[object, object]", value)
        return {_text(str(key)): _value(content) for key, content in pairs.items()}
    if isinstance(value, list | tuple):
        return [_value(item) for item in cast("list[object]", value)]
    return value


def _text(text: str) -> str:
    if "\0" in text:
        text = text.replace("\0", "\N{REPLACEMENT CHARACTER}")
    return (
        text
        if text.isascii()
        else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    )
