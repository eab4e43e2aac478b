"""Values that were read from JSON, held to the types of a dataclass's fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

# What more digits make of a number fits into no array, count or step.
_LARGEST = 2**63


def wrong_fields(cls: type, values: Mapping[str, Any]) -> list[str]:
    """Name the values that are no fields of ``cls``, or not of its field's type."""
    hints = get_type_hints(cls)
    return [name for name, value in values.items() if not _is(hints.get(name), value)]


def _is(hint: Any, value: object) -> bool:  # noqa: ANN401 - a type, or types with | between
    if get_origin(hint) is Mapping:
        return isinstance(value, dict)
    kinds = get_args(hint) or (hint,)
    if type(value) is int:  # True is none
        return abs(value) < _LARGEST and (int in kinds or float in kinds)
    return type(value) in kinds
