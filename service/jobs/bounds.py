"""What a hyperparameter's value may be: checks for pydantic, each with the sentence that refuses, and their JSON schemas.

null and "auto" pass every check: both leave the choice to the service.
"""

import math
from collections.abc import Callable
from typing import cast

from pydantic import WithJsonSchema
from pydantic_core import PydanticCustomError

MAX_MODULES = 64
MAX_MODULE_NAME = 200


def _refuse(want: str, got: object) -> PydanticCustomError:
    shown = repr(got) if isinstance(got, str) else str(got)
    return PydanticCustomError(
        "out_of_bounds", "must be {want}; got {got}", {"want": want, "got": shown[:80]}
    )


def whole(low: int, high: int) -> Callable[[object], object]:
    """A whole number between the two, or equal to one."""
    want = f'"auto" or a whole number from {low} to {high}'

    def check(value: object) -> object:
        if value is None or value == "auto":
            return value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _refuse(want, value)
        return value

    return check


def number(low: float, high: float, *, above: bool = False) -> Callable[[object], object]:
    """A number between the two, or equal to one; `above`: `low` itself is refused."""
    want = f'"auto" or a number {"above" if above else "from"} {low:g} {"up " if above else ""}to {high:g}'

    def check(value: object) -> object:
        if value is None or value == "auto":
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _refuse(want, value)
        if not low <= value <= high or (above and value == low) or not math.isfinite(value):
            raise _refuse(want, value)
        return float(value)

    return check


def choice(*choices: str) -> Callable[[object], object]:
    """One of some words."""
    want = " or ".join(f'"{choice}"' for choice in ("auto", *choices))

    def check(value: object) -> object:
        if value is None or value == "auto" or value in choices:
            return value
        raise _refuse(want, value)

    return check


def flag(value: object) -> object:
    """A boolean."""
    if value is None or value == "auto" or isinstance(value, bool):
        return value
    raise _refuse('"auto", true or false', value)


def modules(*words: str) -> Callable[[object], object]:
    """A list of module names, or one of `words`."""
    said = "".join(f'"{word}", ' for word in ("auto", *words))[:-2]
    want = f'{said} or a list of 1 to {MAX_MODULES} module names such as "q_proj"'

    def check(value: object) -> object:
        if value is None or value in ("auto", *words):
            return value
        names = cast("list[object]", value) if isinstance(value, list) else None
        if names is None:
            raise _refuse(want, cast("object", value))
        if not 1 <= len(names) <= MAX_MODULES:
            raise _refuse(want, names)
        if not all(isinstance(name, str) and 1 <= len(name) <= MAX_MODULE_NAME for name in names):
            raise _refuse(want, names)
        return list(dict.fromkeys(names))

    return check


def schema(type_: str, **bounds: float) -> WithJsonSchema:
    """Describe a number or a flag."""
    return WithJsonSchema(
        {"anyOf": [{"const": "auto"}, {"type": type_, **bounds}, {"type": "null"}]}
    )


def words(*choices: str) -> WithJsonSchema:
    """Describe one of some words."""
    return WithJsonSchema({"anyOf": [{"enum": ["auto", *choices]}, {"type": "null"}]})


def module_names(*words: str) -> WithJsonSchema:
    """Describe a list of module names, or one of `words`."""
    names = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_MODULES}
    return WithJsonSchema({"anyOf": [{"enum": ["auto", *words]}, names, {"type": "null"}]})
