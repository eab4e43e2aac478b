"""What a refused request is told: one sentence, and the path of the field it is about.

The trap: in pydantic's `loc`, branches of a union stand between real path parts (`n_epochs.int`). A part counts as
real if it can be followed in what the user sent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from fastapi.exceptions import RequestValidationError

_MAX_PROBLEMS = 5


@dataclass(frozen=True)
class Problem:
    """A refused request: the sentence, the first field it is about, OpenAI's code."""

    message: str
    param: str | None
    code: str


def explain(error: RequestValidationError) -> Problem:
    """Return what to tell the user of a request that does not fit its schema."""
    by_param: dict[str, list[dict[str, Any]]] = {}
    for item in error.errors():
        problem = cast("dict[str, Any]", item)
        by_param.setdefault(_path(problem, error.body), []).append(problem)
    sentences = [_sentence(param, problems) for param, problems in by_param.items()]
    if len(sentences) > _MAX_PROBLEMS:
        sentences = [*sentences[:_MAX_PROBLEMS], f"And {len(sentences) - _MAX_PROBLEMS} more."]
    param, problems = next(iter(by_param.items()), ("", [{"type": "unknown"}]))
    return Problem(" ".join(sentences), param or None, _code(problems))


def _path(problem: dict[str, Any], body: object) -> str:
    place, *parts = cast("Sequence[str | int]", problem["loc"])
    if place != "body":
        return ".".join(str(part) for part in parts)
    names: list[str] = []
    here = body
    for i, part in enumerate(parts):
        if isinstance(here, dict) and part in here:
            here = cast("dict[object, object]", here)[part]
        elif isinstance(here, list) and isinstance(part, int):
            items = cast("list[object]", here)
            here = items[part] if part < len(items) else None
        elif i + 1 < len(parts) or problem["type"] != "missing":
            continue  # a union's branch
        names.append(f"[{part}]" if isinstance(part, int) else f".{part}")
    return "".join(names).removeprefix(".")


def _sentence(param: str, problems: list[dict[str, Any]]) -> str:
    kind = problems[0]["type"]
    if kind == "json_invalid":
        reason = problems[0].get("ctx", {}).get("error", "")
        return f"The body is not valid JSON ({reason}). Send a JSON object."
    if kind == "missing":
        return (
            f"Missing required parameter: '{param}'."
            if param
            else "The body is missing: send a JSON object."
        )
    if kind == "extra_forbidden":
        return f"Unknown parameter: '{param}'."
    wanted = list(dict.fromkeys(_wanted(problem) for problem in problems))
    reason = "; or ".join(wanted)
    return f"Invalid '{param}': {reason}." if param else f"Invalid request: {reason}."


_OBJECT = "must be a JSON object"
_WHOLE = "must be a whole number"
_NUMBER = "must be a number"
_SWITCH = "must be true or false"
_WORDS = {
    "string_type": "must be a string",
    "list_type": "must be a list",
    "dict_type": _OBJECT,
    "model_type": _OBJECT,
    "model_attributes_type": _OBJECT,
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_from_float": _WHOLE,
    "int_parsing_size": "must be a whole number of fewer digits",
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "bool_type": _SWITCH,
    "bool_parsing": _SWITCH,
    "literal_error": "must be {expected}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be {le} or less",
}
"""Pydantic's kinds of error; our own checks say what they want themselves."""


def _wanted(problem: dict[str, Any]) -> str:
    words = _WORDS.get(problem["type"])
    if words is not None:
        return words.format_map(problem.get("ctx", {}))
    message = str(problem["msg"]).removeprefix("Value error, ").rstrip(".")
    return message[:1].lower() + message[1:]


def _code(problems: list[dict[str, Any]]) -> str:
    codes = {
        "missing": "missing_required_parameter",
        "extra_forbidden": "unknown_parameter",
        "json_invalid": "invalid_json",
    }
    return codes.get(problems[0]["type"], "invalid_value")
