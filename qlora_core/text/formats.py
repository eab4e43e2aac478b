"""The shapes a line of a training file may have, and what is wrong with one that has another.

Three formats: chat (``{"messages": […]}``) and completion (``{"prompt": …, "completion": …}``), both as
OpenAI documents them, and plain text (``{"text": …}``). A parsed chat example is already in the form chat templates expect: text
contents joined, the deprecated ``functions`` turned into tools, tool call arguments as objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_core.text.calls import calls_of, tools_of
from qlora_core.text.example_error import ExampleError, json_type, shortened, shown
from qlora_core.text.report import DatasetFormat

Json = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Templates know neither of OpenAI's newer and older names.
_TEMPLATE_ROLE = {"developer": "system", "function": "tool"}
_TEXT_FIELDS = ("name", "tool_call_id", "refusal", "reasoning_content", "reasoning", "thinking")
_MESSAGE_FIELDS = {"role", "content", "weight", "tool_calls", "function_call", *_TEXT_FIELDS}
_UNEXPECTED_FORMAT = (
    "Unexpected file format, expected either prompt/completion pairs or chat messages."
)


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


@dataclass(frozen=True)
class TextExample:
    """A text that is trained as it stands, special tokens in it included."""

    text: str
    format: DatasetFormat = "text"


def parse_example(line: Mapping[str, Any]) -> ChatExample | CompletionExample | TextExample:
    """Check one decoded line and bring it into a form that can be encoded.

    Raises:
        ExampleError: naming what is wrong and in which field.
    """
    if "messages" in line:
        return _chat(line)
    if "prompt" in line or "completion" in line:
        return _completion(line)
    if "text" in line:
        return _text(line)
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
                f"{{example}} {name} must be a string, not {json_type(line[name])}.",
                name,
            )
    if not line["completion"]:
        raise ExampleError("empty_completion", "{example} completion is empty.", "completion")
    return CompletionExample(line["prompt"], line["completion"])


def _text(line: Mapping[str, Any]) -> TextExample:
    text = line["text"]
    if not isinstance(text, str):
        raise ExampleError(
            "wrong_type", f"{{example}} text must be a string, not {json_type(text)}.", "text"
        )
    if not text:
        raise ExampleError("empty_text", "{example} text is empty.", "text")
    return TextExample(text)


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
    return ChatExample(tuple(messages), trained, tools_of(line))


def _message(message: object, index: int) -> Json:
    where = f"{{example}}, message {index + 1}"
    field = f"messages[{index}]"
    if not isinstance(message, dict):
        raise ExampleError(
            "wrong_type", f"{where} must be an object, not {json_type(message)}.", field
        )
    role = _role(message, where, field)
    for name, value in message.items():
        if name not in _MESSAGE_FIELDS and value is not None:
            raise ExampleError(
                "unknown_field",
                f"{where} has the unknown field {shown(name)}.",
                f"{field}.{shortened(name)}",
            )
        if name in _TEXT_FIELDS and not isinstance(value, str | None):
            raise ExampleError(
                "wrong_type",
                f"{where} {name} must be a string, not {json_type(value)}.",
                f"{field}.{name}",
            )
    _check_weight(message, role, where, field)

    prepared: Json = {"role": _TEMPLATE_ROLE.get(role, role)}
    calls = calls_of(message, role, where, field)
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
            f"{where} Discriminator 'role' has the unknown value {shown(role)}: "
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
            f"{where} weight must be 0 or 1, not {shown(weight)}.",
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
            f"{where} content must be a string or a list of text parts, not {json_type(content)}.",
            field,
        )
    return "\n".join(
        _part_text(part, where, f"{field}[{index}]") for index, part in enumerate(content)
    )


def _part_text(part: object, where: str, field: str) -> str:
    if not isinstance(part, dict):
        raise ExampleError(
            "wrong_type", f"{where} has a content part that is {json_type(part)}.", field
        )
    kind = part.get("type")
    if kind not in ("text", "refusal"):
        raise ExampleError(
            "unsupported_content",
            f"{where} has a content part of type {shown(kind)}: only text can be trained on.",
            field,
        )
    if not isinstance(part.get(kind), str):
        raise ExampleError(
            "wrong_type", f"{where} has a {kind} part without its text.", f"{field}.{kind}"
        )
    return part[kind]
