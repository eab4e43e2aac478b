"""What a well-formed example may not hold, since the model would be trained on something else than it says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from qlora_core.text.example_error import ExampleError, shown
from qlora_core.text.formats import ChatExample


def refuse_tokens(forbidden: re.Pattern[str] | None, value: object) -> None:
    """Refuse a forbidden token anywhere in decoded JSON: with it, a message could forge a turn."""
    if forbidden is None:
        return
    for text in _strings_in(value):
        found = forbidden.search(text)
        if found:
            raise ExampleError(
                "special_token",
                f"{{example}} message contains an invalid token: {found.group()}.",
            )


def refuse_unwritten_tools(example: ChatExample, text: str) -> None:
    """Many templates know no tools and leave them and their calls out without a word."""
    for index, tool in enumerate(example.tools or ()):
        name = tool["function"]["name"]
        if name not in text:
            raise ExampleError(
                "tools_not_written",
                f"{{example}} has the tool {shown(name)}, but the model's chat template does not write it.",
                f"tools[{index}]",
            )
    for index, message in enumerate(example.messages):
        for call in message.get("tool_calls", ()):
            name = call["function"]["name"]
            if name not in text:
                raise ExampleError(
                    "tools_not_written",
                    f"{{example}}, message {index + 1} calls {shown(name)}, but the model's chat template does not "
                    "write calls.",
                    f"messages[{index}].tool_calls",
                )


def checked_unicode(text: str) -> str:
    """JSON can hold half of a surrogate pair, which is no character and cannot be tokenized."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ExampleError(
            "invalid_unicode",
            "{example} contains an unpaired surrogate (\\ud800-\\udfff), which is not a character.",
        ) from error
    return text


def _strings_in(value: object) -> Iterator[str]:
    """Walk every string in decoded JSON, keys included: templates print both."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _strings_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings_in(item)


def refuse_unknown_ids(ids: Sequence[int], embedding_rows: int | None) -> None:
    """Hold an example's ids to what the model's config says it has embeddings for, None where it does not say.

    Raises:
        ExampleError: the model has none for one of them: its tokenizer is not its own, or has grown.
    """
    largest = max(ids, default=0)
    if embedding_rows is not None and largest >= embedding_rows:
        raise ExampleError(
            "unknown_token",
            f"{{example}} has a token with the token id {largest}, but the base model's vocab_size (config.json) is "
            f"{embedding_rows}: its tokenizer is not its own, or was given tokens that the model was not.",
        )
