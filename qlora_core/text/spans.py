"""Where in a rendered conversation the assistant speaks, found by rendering prefixes, not by searching.

What the model must learn to write at turn ``i`` is what the template adds after the generation prompt
of the messages before it: ``full[len(render(m[:i], prompt)) : len(render(m[:i + 1]))]``.

Some templates write a turn differently once others follow (Qwen3 drops the reasoning of earlier turns),
so that a prefix of the messages does not render to a prefix of the text. Then a boundary is found by
changing what one message says and looking where the text changes; the turn is known to end at the first
token that ends turns after what it says, and before what the next message says. Where that does not settle it either, the example is
refused: a mask is never guessed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_core.text.formats import ExampleError
from qlora_core.text.template import ChatTemplate, TemplateError

Message = dict[str, Any]

# Two, with different first and last letters: one of them differs from any content in its first letter, and one
# in its last.
_REPLACEMENTS = ("Azure", "Brown")


@dataclass(frozen=True)
class Span:
    """Characters ``[start, end)`` of the text that one assistant message produced.

    ``exact`` is False where ``end`` reaches into the next message's header; the turn then ends with the
    first token that ends turns and does itself not end before ``said_until``.
    """

    message: int
    start: int
    end: int
    exact: bool
    said_until: int = 0


def assistant_spans(
    template: ChatTemplate,
    messages: Sequence[Message],
    trained: Sequence[bool],
    *,
    tools: Sequence[Message] | None,
) -> tuple[str, list[Span]]:
    """Render the conversation and locate the messages marked in ``trained``.

    Returns:
        The whole text, and a span for each trained message, in order, not overlapping.

    Raises:
        TemplateError: the template refuses the messages.
        ExampleError: ``template_not_prefix``: a trained turn cannot be located.
    """
    conversation = _Conversation(template, messages, tools)
    spans = [conversation.span(index) for index, wanted in enumerate(trained) if wanted]
    for before, after in itertools.pairwise(spans):
        if after.start < before.end and before.exact:
            raise _unlocated(after.message)
    return conversation.full, spans


@dataclass(frozen=True)
class _Conversation:
    template: ChatTemplate
    messages: Sequence[Message]
    tools: Sequence[Message] | None
    full: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "full", self._render(self.messages))

    def span(self, index: int) -> Span:
        start = self._start(index)
        if index + 1 == len(self.messages):
            return Span(index, start, len(self.full), exact=True)
        end = self._prefix_end(index + 1)
        if end is not None and end >= start:
            return Span(index, start, end, exact=True)
        overshoot = self._words_start(index + 1)
        if overshoot is None or overshoot < start:
            raise _unlocated(index)
        return Span(index, start, overshoot, exact=False, said_until=self._words_end(index))

    def _start(self, index: int) -> int:
        """Return where the generation prompt of the messages before ``index`` ends."""
        try:
            prompt = self._render(self.messages[:index], add_generation_prompt=True)
        except TemplateError:
            prompt = ""  # no template is written for a conversation that the assistant opens
        if prompt and self.full.startswith(prompt):
            return len(prompt)
        # The prompt may hold more than the turn shows (an opened <think>): take what they share.
        before = self._prefix_end(index) if prompt else None
        if before is not None:
            return _shared_length(self.full, prompt)
        words = self._words_start(index)
        end = None if words is None else self._prompt_end(index, prompt, latest=words)
        if end is not None:
            return end
        message = self.messages[index]
        if words is None or message.get("reasoning_content") or message.get("thinking"):
            raise _unlocated(index)  # its reasoning may stand before its words, or not
        return words

    def _prompt_end(self, index: int, prompt: str, *, latest: int) -> int | None:
        """Return where the text since the words of the message before is just how the prompt ends."""
        said_before = self._words_end(index - 1) if index > 0 else 0
        if not said_before:
            return None
        for end in range(latest, said_before, -1):
            if prompt.endswith(self.full[said_before:end]):
                return end
        return None

    def _prefix_end(self, count: int) -> int | None:
        """Return how far the first ``count`` messages reach, None where they render differently."""
        try:
            prefix = self._render(self.messages[:count])
        except TemplateError:
            return None
        return len(prefix) if prefix and self.full.startswith(prefix) else None

    def _words_start(self, index: int) -> int | None:
        """Return where the words of a message begin: where the text changes with them. None where it has none."""
        changed = self._changed(index)
        return min((_shared_length(self.full, text) for text in changed), default=None)

    def _words_end(self, index: int) -> int:
        """Return where the words of a message end: after them the text does not change. 0 where it has none."""
        changed = self._changed(index)
        shared = [_shared_length(self.full[::-1], text[::-1]) for text in changed]
        return max((len(self.full) - length for length in shared), default=0)

    def _changed(self, index: int) -> list[str]:
        """Render the conversation with other words (content or calls) in one message; nothing where it has none."""
        message = self.messages[index]
        if not (message.get("content") or message.get("tool_calls")):
            return []
        other = {key: value for key, value in message.items() if key != "tool_calls"}
        texts: list[str] = []
        for content in _REPLACEMENTS:
            changed = [*self.messages]
            changed[index] = {**other, "content": content}
            try:
                texts.append(self._render(changed))
            except TemplateError:
                return []
        return texts

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        return self.template.render(
            messages, tools=self.tools, add_generation_prompt=add_generation_prompt
        )


def _shared_length(left: str, right: str) -> int:
    """Return how many characters two texts begin with in common."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _unlocated(index: int) -> ExampleError:
    return ExampleError(
        "template_not_prefix",
        f"{{example}}, message {index + 1} cannot be located in the rendered conversation: the model's "
        "chat template writes a turn differently once others follow (often it drops their reasoning). "
        "Give each such turn its own example, or set its weight to 0.",
        f"messages[{index}]",
    )
