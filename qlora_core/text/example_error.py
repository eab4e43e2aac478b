"""ExampleError: what is wrong with one line of a dataset file, in which field, in whose words."""

from __future__ import annotations

import json

from qlora_core.errors import EngineError

_SHOWN_CHARACTERS = 40


class ExampleError(EngineError):
    """One line cannot be used.

    Attributes:
        code: snake_case, for programs.
        message: what is wrong; ``{example}`` stands where the example's number belongs.
        field: where in the line, as in ``LineError``.
    """

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.field = field


def json_type(value: object) -> str:
    """Return the name of a decoded value's type, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    if value is None:
        return "null"
    return names.get(type(value), "a number")


def shown(value: object) -> str:
    """Quote a value from a file, short enough for a message."""
    return shortened(json.dumps(value, ensure_ascii=False))


def shortened(text: str, characters: int = _SHOWN_CHARACTERS) -> str:
    """Return a text of a file as a message can quote it: cut, since a message must not grow with the file.

    JSON can hold half of a surrogate pair, which UTF-8 cannot: it is written as its escape.
    """
    text = text if len(text) <= characters else text[:characters] + "…"
    return text.encode("utf-8", "backslashreplace").decode()
