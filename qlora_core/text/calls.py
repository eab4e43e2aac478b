"""Tools and the calls of them, in the one form that chat templates know, from both of OpenAI's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qlora_core.text.example_error import ExampleError

Json = dict[str, Any]


def tools_of(line: Mapping[str, Any]) -> tuple[Json, ...] | None:
    """Return ``tools``, or the older ``functions`` as tools, or None where there are none."""
    for name in ("tools", "functions"):
        value = line.get(name)
        if value is None:
            continue
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise ExampleError("wrong_type", f"{{example}} {name} must be a list of objects.", name)
        for index, item in enumerate(value):
            _check_tool(name, index, item)
        if not value:
            return None
        if name == "tools":
            return tuple(value)
        return tuple({"type": "function", "function": item} for item in value)
    return None


def _check_tool(name: str, index: int, item: Json) -> None:
    field = f"{name}[{index}]"
    if name == "tools":
        field += ".function"
        item = item.get("function")  # type: ignore[assignment]
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        raise ExampleError(
            "wrong_type", f"{{example}} {field} must be an object with a name.", field
        )


def calls_of(message: Json, role: str, where: str, field: str) -> list[Json]:
    """Return the calls a message makes, arguments as objects; the older ``function_call`` too."""
    calls = message.get("tool_calls")
    name = "tool_calls"
    if calls is None and message.get("function_call") is not None:
        name = "function_call"
        calls = [{"type": "function", "function": message["function_call"]}]
    if calls is None:
        return []
    if role != "assistant":
        raise ExampleError(
            "wrong_type", f"{where} has {name}, but only the assistant calls.", f"{field}.{name}"
        )
    if not isinstance(calls, list):
        raise ExampleError("wrong_type", f"{where} {name} must be a list.", f"{field}.{name}")
    prepared: list[Json] = []
    for index, call in enumerate(calls):
        here = f"{field}.{name}" + (f"[{index}].function" if name == "tool_calls" else "")
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ExampleError("wrong_type", f"{where} has a call without a function name.", here)
        arguments = _arguments(function.get("arguments"), where, f"{here}.arguments")
        prepared.append(
            {**call, "type": "function", "function": {**function, "arguments": arguments}}
        )
    return prepared


def _arguments(arguments: object, where: str, field: str) -> Json:
    """OpenAI writes arguments as a JSON string, templates print objects: decode it."""
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise ExampleError(
            "wrong_type", f"{where} has call arguments that are not a JSON object.", field
        )
    return arguments
