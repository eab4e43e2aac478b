"""What is wrong with one line, in which field, in whose words."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_core.text import ChatExample, CompletionExample, ExampleError, TextExample, parse_example

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def _chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


BAD: list[tuple[dict[str, Any], str, str | None, str]] = [
    (_chat(USER, {"content": "a"}), "missing_role", "messages[1].role",
     "{example}, message 2 Discriminator 'role' is missing in value"),
    (_chat(USER, {"role": None, "content": "a"}), "missing_role", "messages[1].role",
     "Discriminator 'role' is missing"),
    (_chat({"role": "bot", "content": "a"}), "unknown_role", "messages[0].role", "\"bot\""),
    (_chat({"role": ["user"], "content": "a"}), "unknown_role", "messages[0].role", "unknown value"),
    (_chat(USER), "no_assistant_message", "messages", "at least one message from the assistant"),
    (_chat(), "no_messages", "messages", "no messages"),
    ({"messages": "hi"}, "wrong_type", "messages", "must be a list"),
    ({"messages": {"role": "user"}}, "wrong_type", "messages", "must be a list"),
    (_chat("hi"), "wrong_type", "messages[0]", "must be an object, not a string"),
    (_chat({"role": "user"}, ANSWER), "missing_content", "messages[0].content", "content is missing"),
    (_chat({"role": "user", "content": None}, ANSWER), "missing_content", "messages[0].content", "missing"),
    (_chat(USER, {"role": "assistant"}), "missing_content", "messages[1].content", "missing"),
    (_chat({"role": "user", "content": 5}, ANSWER), "wrong_type", "messages[0].content", "not a number"),
    (_chat({"role": "user", "content": {"a": 1}}, ANSWER), "wrong_type", "messages[0].content", "not an object"),
    (_chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER),
     "unsupported_content", "messages[0].content[0]", "image_url"),
    (_chat({"role": "user", "content": [{"type": "text"}]}, ANSWER),
     "wrong_type", "messages[0].content[0].text", "without its text"),
    (_chat({"role": "user", "content": ["a"]}, ANSWER), "wrong_type", "messages[0].content[0]", "a string"),
    (_chat(USER, {**ANSWER, "weight": 2}), "wrong_weight", "messages[1].weight", "0 or 1, not 2"),
    (_chat(USER, {**ANSWER, "weight": True}), "wrong_weight", "messages[1].weight", "not true"),
    (_chat(USER, {**ANSWER, "weight": "0"}), "wrong_weight", "messages[1].weight", "0 or 1"),
    (_chat(USER, {**ANSWER, "weight": 0.5}), "wrong_weight", "messages[1].weight", "not 0.5"),
    (_chat(USER, {**ANSWER, "weight": [1]}), "wrong_weight", "messages[1].weight", "0 or 1"),
    (_chat({**USER, "weight": 1}, ANSWER), "wrong_weight", "messages[0].weight", "only assistant"),
    (_chat(USER, {**ANSWER, "weigth": 0}), "unknown_field", "messages[1].weigth", '"weigth"'),
    (_chat({**USER, "name": 3}, ANSWER), "wrong_type", "messages[0].name", "must be a string"),
    (_chat({**USER, "tool_calls": [CALL]}, ANSWER), "wrong_type", "messages[0].tool_calls", "only the assistant"),
    (_chat(USER, {"role": "assistant", "tool_calls": "f"}), "wrong_type", "messages[1].tool_calls", "a list"),
    (_chat(USER, {"role": "assistant", "tool_calls": [{"type": "function"}]}),
     "wrong_type", "messages[1].tool_calls[0].function", "without a function name"),
    (_chat(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1"}}]}),
     "wrong_type", "messages[1].tool_calls[0].function.arguments", "not a JSON object"),
    (_chat(USER, {"role": "assistant", "function_call": {"name": "f", "arguments": "7"}}),
     "wrong_type", "messages[1].function_call.arguments", "not a JSON object"),
    (_chat(USER, ANSWER, tools={}), "wrong_type", "tools", "list of objects"),
    (_chat(USER, ANSWER, tools=[{"type": "function"}]), "wrong_type", "tools[0].function", "with a name"),
    (_chat(USER, ANSWER, functions=[{}]), "wrong_type", "functions[0]", "with a name"),
    (_chat(USER, ANSWER, parallel_tool_calls="no"), "wrong_type", "parallel_tool_calls", "true or false"),
    ({"prompt": "a"}, "missing_field", "completion", "completion is missing"),
    ({"completion": "a"}, "missing_field", "prompt", "prompt is missing"),
    ({"prompt": ["a"], "completion": "b"}, "wrong_type", "prompt", "must be a string, not a list"),
    ({"prompt": "a", "completion": ""}, "empty_completion", "completion", "empty"),
    ({}, "unexpected_format", None,
     "Unexpected file format, expected either prompt/completion pairs or chat messages."),
    ({"text": ["a"]}, "wrong_type", "text", "must be a string, not a list"),
    ({"text": ""}, "empty_text", "text", "empty"),
    ({"txt": "a"}, "unexpected_format", None, "Unexpected file format"),
    ({"input": {}, "preferred_output": [], "non_preferred_output": []}, "unexpected_format", None, "dpo"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "code", "field", "message"), BAD)
def test_says_what_is_wrong_and_where(
    line: dict[str, Any], code: str, field: str | None, message: str
) -> None:
    with pytest.raises(ExampleError) as raised:
        parse_example(line)

    assert (raised.value.code, raised.value.field) == (code, field)
    assert message in raised.value.message


GOOD: list[dict[str, Any]] = [
    _chat(USER, ANSWER, parallel_tool_calls=None, metadata={"id": 1}),
    _chat(USER, {**ANSWER, "weight": None, "refusal": None, "audio": None}),
    _chat({"role": "developer", "content": "s"}, USER, ANSWER),
    _chat(USER, {"role": "assistant", "refusal": "no"}),
    _chat(USER, {"role": "assistant", "content": "", "weight": 1}),
    _chat({**USER, "weight": 0}, ANSWER, tools=None, functions=[]),
    _chat(USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "1", "content": "x"}),
]  # fmt: skip


@pytest.mark.parametrize("line", GOOD)
def test_accepts_what_openai_accepts(line: dict[str, Any]) -> None:
    example = parse_example(line)

    assert isinstance(example, ChatExample)
    assert sum(example.trained) == 1


def test_weight_zero_is_not_trained() -> None:
    example = parse_example(_chat(USER, {**ANSWER, "weight": 0}, USER, ANSWER))

    assert isinstance(example, ChatExample)
    assert example.trained == (False, False, False, True)
    assert "weight" not in example.messages[1]


def test_completion_pairs_keep_their_spaces() -> None:
    example = parse_example({"prompt": "", "completion": "  x ", "id": 7})

    assert example == CompletionExample("", "  x ")


def test_a_text_is_taken_as_it_is() -> None:
    example = parse_example({"text": " x\n", "source": "somewhere"})

    assert example == TextExample(" x\n")
