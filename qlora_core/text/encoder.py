"""TextEncoder: a model folder's tokenizer and chat template, turning examples into ids and loss masks.

The ids of a conversation are those of its whole rendered text, so they equal `transformers`'; the mask
follows from character spans, never from searching ids. Templates write their own BOS: none is added.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from qlora_core.text.files import TextFiles, read_text_files
from qlora_core.text.formats import (
    ChatExample,
    CompletionExample,
    ExampleError,
    messages_for_template,
    parse_example,
)
from qlora_core.text.spans import Span, assistant_spans
from qlora_core.text.template import ChatTemplate, TemplateError

Message = Mapping[str, Any]

_PROBE_ANSWER = "probed answer"


@dataclass(frozen=True)
class EncodedExample:
    """An example as the model sees it.

    Attributes:
        input_ids: token ids [tokens], cut to the context length.
        trained: per token, whether predicting it carries loss; never for the first, which nothing predicts.
        truncated: whether tokens were cut off at the end.
        n_trained_tokens: how many of ``trained`` are True.
        n_tokens_before: how long it was before the cut.
    """

    input_ids: list[int]
    trained: list[bool]
    truncated: bool
    n_trained_tokens: int
    n_tokens_before: int


class TextEncoder:
    """Renders, tokenizes and masks for one base model; safe to share between threads.

    Attributes:
        folder: where it was read from, None where it was not.
        eos_id, bos_id: of the named tokens, None where the model names none.
        pad_id: of the pad token, else of EOS, else 0. Padding never carries loss or attention.
        stop_ids: ids that end an answer: EOS, those of ``generation_config.json`` and ``config.json``, and
            the token that the chat template writes after an answer.
        vocab_size: ids are below it.
        context_length: ``max_position_embeddings``, None where ``config.json`` does not say.
    """

    def __init__(self, files: TextFiles, *, folder: Path | None = None) -> None:
        self.folder = folder
        self._named_tokens = files.named_tokens
        self._tokenizer = files.tokenizer
        self._prefix_ids = _prefix_ids(files.tokenizer)
        # Its only work left here would be to trim spaces from offsets, and the mask needs them whole.
        self._tokenizer.post_processor = None  # type: ignore[assignment]
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.bos_id = self._named_id("bos_token")
        self.eos_id = self._named_id("eos_token")
        pad_id = self._named_id("pad_token")
        self.pad_id = pad_id if pad_id is not None else (self.eos_id or 0)
        self.context_length = files.context_length
        self.vocab_size = max(files.vocab_size or 0, self._tokenizer.get_vocab_size())
        self._templates = {
            name: ChatTemplate(source, files.named_tokens)
            for name, source in files.templates.items()
        }
        self.stop_ids = self._find_stop_ids(files.stop_ids)
        self._forbidden = self._find_forbidden_tokens()

    @classmethod
    def from_folder(cls, model_folder: Path | str) -> TextEncoder:
        """Read a model folder's tokenizer files.

        Raises:
            ModelNotFound: there is no such folder.
            ModelUnsupported: there is no ``tokenizer.json``, or a file is malformed.
            TemplateError: a chat template is not valid jinja.
        """
        folder = Path(model_folder)
        return cls(read_text_files(folder), folder=folder)

    @property
    def has_chat_template(self) -> bool:
        """Whether chat examples can be rendered at all."""
        return bool(self._templates)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return the conversation as text, as ``apply_chat_template(tokenize=False)`` would.

        Raises:
            TemplateError: there is no template, or it refuses the messages.
        """
        template = self._template(tools)
        return template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt)

    def encode(
        self,
        example: Mapping[str, Any] | ChatExample | CompletionExample,
        *,
        context_length: int,
    ) -> EncodedExample:
        """Tokenize one example and mark what is trained.

        Args:
            example: a decoded line of a dataset file, or what ``parse_example`` made of it.
            context_length: tokens; what is longer is cut at its end.

        Raises:
            ExampleError: the example is malformed, holds a special token, or cannot be masked exactly.
            TemplateError: the chat template refuses it.
        """
        if isinstance(example, Mapping):
            example = parse_example(example)
        if isinstance(example, ChatExample):
            ids, trained = self._encode_chat(example)
        else:
            ids, trained = self._encode_completion(example)
        trained[0] = False
        kept = trained[:context_length]
        return EncodedExample(
            input_ids=ids[:context_length],
            trained=kept,
            truncated=len(ids) > context_length,
            n_trained_tokens=sum(kept),
            n_tokens_before=len(ids),
        )

    def encode_prompt(self, messages: Sequence[Message] | str) -> list[int]:
        """Return the ids that an answer to these messages (or to a plain text) is generated from.

        Raises:
            ExampleError: a message is malformed or holds a special token.
            TemplateError: there is no template, or it refuses the messages.
        """
        if isinstance(messages, str):
            self._refuse_special_tokens([messages])
            return [*self._prefix_ids, *self._ids(messages)] or [self.pad_id]
        prepared = messages_for_template(messages)
        self._refuse_special_tokens(prepared)
        return self._ids(self.render(prepared, add_generation_prompt=True))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def _encode_chat(self, example: ChatExample) -> tuple[list[int], list[bool]]:
        self._refuse_special_tokens(example.messages)
        self._refuse_special_tokens(example.tools or ())
        text, spans = assistant_spans(
            self._template(example.tools),
            list(example.messages),
            example.trained,
            tools=example.tools,
        )
        encoding = self._tokenizer.encode(_checked_unicode(text), add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        if not ids:
            raise ExampleError("empty_example", "{example} renders to an empty text.")
        trained = [False] * len(ids)
        for span in spans:
            start, end = self._trained_range(span, ids, offsets)
            trained[start:end] = [True] * (end - start)
        ends_open = (
            bool(spans) and spans[-1].end == len(text) and not self._ends_in_stop(ids, trained)
        )
        if ends_open and self.eos_id is not None:
            # The template writes nothing after the last answer; without this the model never learns to stop.
            ids, trained = [*ids, self.eos_id], [*trained, True]
        return ids, trained

    def _trained_range(
        self, span: Span, ids: list[int], offsets: list[tuple[int, int]]
    ) -> tuple[int, int]:
        """Return the tokens of a span, up to and with the one that ends the turn."""
        first = next((i for i, (_, end) in enumerate(offsets) if end > span.start), len(ids))
        last = first
        while last < len(ids) and offsets[last][0] < span.end:
            last += 1
        stops = [i for i in range(first, last) if ids[i] in self.stop_ids]
        if not span.exact:
            if not stops:
                raise ExampleError(
                    "template_not_prefix",
                    f"{{example}}, message {span.message + 1} cannot be masked: the chat template writes no "
                    "stop token after it, and writes it differently once other turns follow.",
                    f"messages[{span.message}]",
                )
            return first, stops[0] + 1
        if stops:
            return first, stops[-1] + 1
        if last < len(ids) and ids[last] in self.stop_ids:
            last += 1  # GLM ends an answer with the next turn's header token
        return first, last

    def _ends_in_stop(self, ids: list[int], trained: list[bool]) -> bool:
        last = next((i for i in range(len(ids) - 1, -1, -1) if trained[i]), None)
        return last is not None and ids[last] in self.stop_ids

    def _encode_completion(self, example: CompletionExample) -> tuple[list[int], list[bool]]:
        self._refuse_special_tokens([example.prompt, example.completion])
        text = _checked_unicode(example.prompt + example.completion)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        boundary = len(example.prompt)
        ids = [*self._prefix_ids, *encoding.ids]
        trained = [False] * len(self._prefix_ids)
        trained += [end > boundary for _, end in encoding.offsets]
        if self.eos_id is not None:
            ids, trained = [*ids, self.eos_id], [*trained, True]
        if not ids:
            raise ExampleError("empty_example", "{example} has no tokens.")
        return ids, trained

    def _template(self, tools: Sequence[Any] | None) -> ChatTemplate:
        """Return the template for these messages: ``tool_use`` where there are tools and such a one."""
        if tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        template = self._templates.get("default")
        if template is None:
            raise TemplateError(
                "The base model has no chat template, so chat messages cannot be rendered; "
                "use prompt/completion pairs."
            )
        return template

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(_checked_unicode(text), add_special_tokens=False).ids

    def _named_id(self, name: str) -> int | None:
        token = self._named_tokens.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)

    def _find_stop_ids(self, declared: Iterable[int]) -> frozenset[int]:
        stop_ids = {token_id for token_id in declared if token_id < self.vocab_size}
        if self.eos_id is not None:
            stop_ids.add(self.eos_id)
        tail = self._probe([("user", "probed question"), ("assistant", _PROBE_ANSWER)])
        if _PROBE_ANSWER in tail:
            added = self._tokenizer.get_added_tokens_decoder()
            ids = self._ids(tail.rpartition(_PROBE_ANSWER)[2])
            stop_ids |= set([i for i in ids if i in added and not added[i].content.isspace()][:1])
        return frozenset(stop_ids)

    def _find_forbidden_tokens(self) -> re.Pattern[str] | None:
        """Tokens that a dataset may not contain as text: with them, it could forge a turn.

        These are the special tokens, and added tokens that the template writes around turns.
        """
        added = self._tokenizer.get_added_tokens_decoder()
        rendered = self._probe([("user", "a"), ("assistant", "b"), ("user", "c")])
        written = set(self._ids(rendered)) | self.stop_ids
        tokens = [
            token.content
            for token_id, token in added.items()
            if (token.special or token_id in written) and not token.content.isspace()
        ]
        longest_first = sorted((t for t in tokens if t), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def _probe(self, turns: Sequence[tuple[str, str]]) -> str:
        """Render a small conversation; an empty text where the template refuses it."""
        try:
            return self.render([{"role": role, "content": content} for role, content in turns])
        except TemplateError:
            return ""

    def _refuse_special_tokens(self, value: object) -> None:
        if self._forbidden is None:
            return
        for text in _strings(value):
            found = self._forbidden.search(text)
            if found:
                raise ExampleError(
                    "special_token",
                    f"{{example}} message contains an invalid token: {found.group()}.",
                )


def _strings(value: object) -> Iterable[str]:
    """Walk every string in decoded JSON, keys included: templates print both."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _prefix_ids(tokenizer: Tokenizer) -> list[int]:
    """Return what the tokenizer writes before a plain text: BOS, or nothing."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    return []


def _checked_unicode(text: str) -> str:
    """JSON can hold half of a surrogate pair, which is no character and cannot be tokenized."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ExampleError(
            "invalid_unicode",
            "{example} contains an unpaired surrogate (\\ud800-\\udfff), which is not a character.",
        ) from error
    return text
