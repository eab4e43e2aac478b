"""The shapes a line of a training file may have, and what is wrong with one that has another.

Two formats: chat (``{"messages": […]}``) and completion (``{"prompt": …, "completion": …}``), both as
OpenAI documents them. A parsed chat example is already in the form chat templates expect: text
contents joined, the deprecated ``functions`` turned into tools, tool call arguments as objects.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_core.errors import EngineError
from qlora_core.text.report import DatasetFormat

Json = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Templates know neither of OpenAI's newer and older names.
_TEMPLATE_ROLE = {"developer": "system", "function": "tool"}
_TEXT_FIELDS = ("name", "tool_call_id", "refusal", "reasoning_content", "reasoning", "thinking")
_MESSAGE_FIELDS = {"role", "content", "weight", "tool_calls", "function_call", *_TEXT_FIELDS}
_SHOWN_CHARACTERS = 40
_UNEXPECTED_FORMAT = (
    "Unexpected file format, expected either prompt/completion pairs or chat messages."
)


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


@dataclass(frozen=True)
class ChatExample:
    """A conversation: messages as templates want them, and which of them are trained."""

    messages: tuple[Json, ...]
    trained: tuple[bool, ...]
    tools: tuple[Json, ...] | None = None
    format: DatasetFormat = "chat"


@dataclass(frozen=True)
class CompletionExample:
    """A prompt and what should follow it; all of the completion is trained."""

    prompt: str
    completion: str
    format: DatasetFormat = "completion"


def parse_example(line: Mapping[str, Any]) -> ChatExample | CompletionExample:
    """Check one decoded line and bring it into a form that can be encoded.

    Raises:
        ExampleError: naming what is wrong and in which field.
    """
    if "messages" in line:
        return _chat(line)
    if "prompt" in line or "completion" in line:
        return _completion(line)
    if "input" in line and any(key.startswith("preferred_") for key in line):
        raise ExampleError(
            "unexpected_format",
            "The line is in the preference (dpo) format, but the job's method is supervised.",
        )
    raise ExampleError("unexpected_format", _UNEXPECTED_FORMAT)


def messages_for_template(messages: object) -> list[Json]:
    """Check a list of messages and return them in the form templates want.

    Raises:
        ExampleError: naming what is wrong and in which field.
    """
    if not isinstance(messages, list | tuple):
        raise ExampleError("wrong_type", "{example} messages must be a list.", "messages")
    if not messages:
        raise ExampleError("no_messages", "{example} has no messages.", "messages")
    return [_message(message, index) for index, message in enumerate(messages)]


def _completion(line: Mapping[str, Any]) -> CompletionExample:
    for name in ("prompt", "completion"):
        if name not in line:
            raise ExampleError("missing_field", f"{{example}} {name} is missing.", name)
        if not isinstance(line[name], str):
            raise ExampleError(
                "wrong_type",
                f"{{example}} {name} must be a string, not {_json_type(line[name])}.",
                name,
            )
    if not line["completion"]:
        raise ExampleError("empty_completion", "{example} completion is empty.", "completion")
    return CompletionExample(line["prompt"], line["completion"])


def _chat(line: Mapping[str, Any]) -> ChatExample:
    messages = messages_for_template(line["messages"])
    if not any(message["role"] == "assistant" for message in messages):
        raise ExampleError(
            "no_assistant_message",
            "{example} must have at least one message from the assistant.",
            "messages",
        )
    trained = tuple(
        message["role"] == "assistant" and original.get("weight", 1) in (1, None)
        for message, original in zip(messages, line["messages"], strict=True)
    )
    if not isinstance(line.get("parallel_tool_calls", True), bool | None):
        raise ExampleError(
            "wrong_type",
            "{example} parallel_tool_calls must be true or false.",
            "parallel_tool_calls",
        )
    return ChatExample(tuple(messages), trained, _tools(line))


def _tools(line: Mapping[str, Any]) -> tuple[Json, ...] | None:
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


def _message(message: object, index: int) -> Json:
    where = f"{{example}}, message {index + 1}"
    field = f"messages[{index}]"
    if not isinstance(message, dict):
        raise ExampleError(
            "wrong_type", f"{where} must be an object, not {_json_type(message)}.", field
        )
    role = _role(message, where, field)
    for name, value in message.items():
        if name not in _MESSAGE_FIELDS and value is not None:
            raise ExampleError(
                "unknown_field",
                f"{where} has the unknown field {_shown(name)}.",
                f"{field}.{shortened(name, _SHOWN_CHARACTERS)}",
            )
        if name in _TEXT_FIELDS and not isinstance(value, str | None):
            raise ExampleError(
                "wrong_type",
                f"{where} {name} must be a string, not {_json_type(value)}.",
                f"{field}.{name}",
            )
    _check_weight(message, role, where, field)

    prepared: Json = {"role": _TEMPLATE_ROLE.get(role, role)}
    calls = _tool_calls(message, role, where, field)
    content = _content(message, role, where, f"{field}.content", required=not calls)
    if content is not None:
        prepared["content"] = content
    if calls:
        prepared["tool_calls"] = calls
    for name in _TEXT_FIELDS:
        if name != "refusal" and message.get(name) is not None:
            prepared[name] = message[name]
    return prepared


def _role(message: Json, where: str, field: str) -> str:
    if message.get("role") is None:
        raise ExampleError(
            "missing_role", f"{where} Discriminator 'role' is missing in value", f"{field}.role"
        )
    role = message["role"]
    if role not in ROLES:
        raise ExampleError(
            "unknown_role",
            f"{where} Discriminator 'role' has the unknown value {_shown(role)}: "
            f"expected one of {', '.join(ROLES)}.",
            f"{field}.role",
        )
    return role


def _check_weight(message: Json, role: str, where: str, field: str) -> None:
    weight = message.get("weight")
    if weight is None:
        return
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ExampleError(
            "wrong_weight",
            f"{where} weight must be 0 or 1, not {_shown(weight)}.",
            f"{field}.weight",
        )
    if weight == 1 and role != "assistant":
        raise ExampleError(
            "wrong_weight",
            f"{where} weight is 1, but only assistant messages are trained.",
            f"{field}.weight",
        )


def _content(message: Json, role: str, where: str, field: str, *, required: bool) -> str | None:
    """Return the content as one string; a list of text parts is joined by newlines."""
    content = message.get("content")
    if content is None and role == "assistant" and message.get("refusal") is not None:
        return message["refusal"]
    if content is None:
        if required:
            raise ExampleError("missing_content", f"{where} content is missing.", field)
        return None
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ExampleError(
            "wrong_type",
            f"{where} content must be a string or a list of text parts, not {_json_type(content)}.",
            field,
        )
    return "\n".join(
        _part_text(part, where, f"{field}[{index}]") for index, part in enumerate(content)
    )


def _part_text(part: object, where: str, field: str) -> str:
    if not isinstance(part, dict):
        raise ExampleError(
            "wrong_type", f"{where} has a content part that is {_json_type(part)}.", field
        )
    kind = part.get("type")
    if kind not in ("text", "refusal"):
        raise ExampleError(
            "unsupported_content",
            f"{where} has a content part of type {_shown(kind)}: only text can be trained on.",
            field,
        )
    if not isinstance(part.get(kind), str):
        raise ExampleError(
            "wrong_type", f"{where} has a {kind} part without its text.", f"{field}.{kind}"
        )
    return part[kind]


def _tool_calls(message: Json, role: str, where: str, field: str) -> list[Json]:
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


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    if value is None:
        return "null"
    return names.get(type(value), "a number")


def _shown(value: object) -> str:
    """Quote a value from a file, short enough for a message."""
    return shortened(json.dumps(value, ensure_ascii=False), _SHOWN_CHARACTERS)


def shortened(text: str, characters: int) -> str:
    """Return a text of a file as a message can quote it: cut, since a message must not grow with the file.

    JSON can hold half of a surrogate pair, which UTF-8 cannot: it is written as its escape.
    """
    text = text if len(text) <= characters else text[:characters] + "…"
    return text.encode("utf-8", "backslashreplace").decode()
