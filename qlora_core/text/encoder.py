"""TextEncoder: a model folder's tokenizer and chat template, turning examples into ids and loss masks.

The ids of a conversation are those of its whole rendered text, so they equal `transformers`'; the mask
follows from character spans, never from searching ids. Templates write their own BOS: none is added.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Encoding

from qlora_core.text.files import TextFiles, read_text_files
from qlora_core.text.formats import (
    ChatExample,
    CompletionExample,
    ExampleError,
    TextExample,
    messages_for_template,
    parse_example,
)
from qlora_core.text.refusals import (
    checked_unicode,
    refuse_tokens,
    refuse_unknown_ids,
    refuse_unwritten_tools,
)
from qlora_core.text.spans import Span, assistant_spans
from qlora_core.text.special_tokens import (
    find_forbidden_tokens,
    find_prefix_ids,
    find_stop_ids,
    find_turn_ends,
)
from qlora_core.text.template import ChatTemplate, TemplateError
from qlora_core.text.token_places import first_token

Message = Mapping[str, Any]


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

    Args:
        files: of the model's folder.
        folder: where they were read from, None where they were not.
        now: the time that a template may print, in seconds since the epoch; the present one if not given. It stands
            still for as long as the encoder is used, so that every example shows the same date.

    Attributes:
        folder, now: as given.
        eos_id, bos_id: of the named tokens, None where the model names none.
        pad_id: of the pad token, else of EOS, else 0. Padding never carries loss or attention.
        stop_ids: ids that end an answer: EOS, those of ``generation_config.json`` and ``config.json``, and
            the token that the chat template writes after an answer.
        vocab_size: ids are below it.
        context_length: ``max_position_embeddings``, None where ``config.json`` does not say.
    """

    def __init__(
        self, files: TextFiles, *, folder: Path | None = None, now: float | None = None
    ) -> None:
        self.folder = folder
        self.now = time.time() if now is None else now
        self._named_tokens = files.named_tokens
        self._tokenizer = files.tokenizer
        self._prefix_ids = find_prefix_ids(files.tokenizer)
        # Its only work left here would be to trim spaces from offsets, and the mask needs them whole.
        self._tokenizer.post_processor = None  # type: ignore[assignment]
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.bos_id = self._named_id("bos_token")
        self.eos_id = self._named_id("eos_token")
        pad_id = self._named_id("pad_token")
        self.pad_id = pad_id if pad_id is not None else (self.eos_id or 0)
        self.context_length = files.context_length
        self._embedding_rows = files.vocab_size
        self.vocab_size = max(files.vocab_size or 0, self._tokenizer.get_vocab_size())
        self._templates = {
            name: ChatTemplate(source, files.named_tokens, now=self.now)
            for name, source in files.templates.items()
        }
        declared = files.stop_ids | (frozenset() if self.eos_id is None else {self.eos_id})
        self.stop_ids = find_stop_ids(
            self._tokenizer, self._probe, declared, vocab_size=self.vocab_size
        )
        self._turn_ends = find_turn_ends(self._tokenizer, self._probe, self.stop_ids)
        self._forbidden = find_forbidden_tokens(self._tokenizer, self._probe, self.stop_ids)

    @classmethod
    def from_folder(cls, model_folder: Path | str, *, now: float | None = None) -> TextEncoder:
        """Read a model folder's tokenizer files.

        Args:
            model_folder: holds ``tokenizer.json`` and its like.
            now: what templates take for the present time; see the class.

        Raises:
            ModelNotFound: there is no such folder.
            ModelUnsupported: there is no ``tokenizer.json``, or a file is malformed.
            TemplateError: a chat template is not valid jinja.
        """
        folder = Path(model_folder)
        return cls(read_text_files(folder), folder=folder, now=now)

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
        example: Mapping[str, Any] | ChatExample | CompletionExample | TextExample,
        *,
        context_length: int,
        train_on_inputs: bool = False,
    ) -> EncodedExample:
        """Tokenize one example and mark what is trained.

        Args:
            example: a decoded line of a dataset file, or what ``parse_example`` made of it.
            context_length: tokens; what is longer is cut at its end.
            train_on_inputs: train the prompt, too: every token but those of assistant messages of weight 0.

        Raises:
            ExampleError: the example is malformed, holds a special token, cannot be masked exactly, or has a token
                that the model has no embedding for.
            TemplateError: the chat template refuses it.
        """
        if isinstance(example, Mapping):
            example = parse_example(example)
        if isinstance(example, ChatExample):
            ids, trained = self._encode_chat(example, train_on_inputs=train_on_inputs)
        elif isinstance(example, CompletionExample):
            ids, trained = self._encode_completion(example)
            trained = [True] * len(ids) if train_on_inputs else trained
        else:
            ids, trained = self._encode_text(example)
        trained[0] = False
        ids_kept, kept = ids[:context_length], trained[:context_length]
        refuse_unknown_ids(ids_kept, self._embedding_rows)
        return EncodedExample(
            input_ids=ids_kept,
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
            refuse_tokens(self._forbidden, [messages])
            return [*self._prefix_ids, *self._encoding(messages).ids] or [self.pad_id]
        prepared = messages_for_template(messages)
        refuse_tokens(self._forbidden, prepared)
        return self._encoding(self.render(prepared, add_generation_prompt=True)).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def _encode_chat(
        self, example: ChatExample, *, train_on_inputs: bool
    ) -> tuple[list[int], list[bool]]:
        refuse_tokens(self._forbidden, example.messages)
        refuse_tokens(self._forbidden, example.tools or ())
        wanted = example.trained
        if train_on_inputs:  # then those are located that are not trained, too
            wanted = tuple(message["role"] == "assistant" for message in example.messages)
        text, spans = assistant_spans(
            self._template(example.tools), list(example.messages), wanted, tools=example.tools
        )
        refuse_unwritten_tools(example, text)
        encoding = self._encoding(text)
        ids = encoding.ids
        if not ids:
            raise ExampleError("empty_example", "{example} renders to an empty text.")
        trained = [train_on_inputs] * len(ids)
        ends_open = False
        for span in spans:
            start, end = self._turn_tokens(span, ids, encoding)
            is_trained = example.trained[span.message]
            trained[start:end] = [is_trained] * (end - start)
            closed = start < end and ids[end - 1] in self._turn_ends
            ends_open = is_trained and span.end == len(text) and not closed
        if ends_open and self.eos_id is not None:
            # The template writes nothing after the last answer; without this the model never learns to stop.
            ids, trained = [*ids, self.eos_id], [*trained, True]
        return ids, trained

    def _turn_tokens(self, span: Span, ids: list[int], encoding: Encoding) -> tuple[int, int]:
        """Return the first token of a turn and the one after its last, which is the one that ends the turn."""
        first = first_token(encoding, ending_after=span.start)
        last = max(first, first_token(encoding, starting_from=span.end))
        if not span.exact:
            # What the message says may itself hold such tokens, between its parts.
            said = max(first, first_token(encoding, ending_after=span.said_until - 1))
            end = next((i for i in range(said, last) if ids[i] in self._turn_ends), None)
            if end is None:
                raise ExampleError(
                    "template_not_prefix",
                    f"{{example}}, message {span.message + 1} cannot be masked: the chat template writes no "
                    "stop token after it, and writes it differently once other turns follow.",
                    f"messages[{span.message}]",
                )
            return first, end + 1
        end = next((i for i in range(last - 1, first - 1, -1) if ids[i] in self._turn_ends), None)
        if end is not None:
            return first, end + 1
        if last < len(ids) and ids[last] in self._turn_ends:
            last += 1  # GLM ends an answer with the next turn's header token
        return first, last

    def _encode_completion(self, example: CompletionExample) -> tuple[list[int], list[bool]]:
        refuse_tokens(self._forbidden, [example.prompt, example.completion])
        encoding = self._encoding(example.prompt + example.completion)
        ids = [*self._prefix_ids, *encoding.ids]
        n_prompt = len(self._prefix_ids) + first_token(encoding, ending_after=len(example.prompt))
        trained = [index >= n_prompt for index in range(len(ids))]
        if self.eos_id is not None:
            ids, trained = [*ids, self.eos_id], [*trained, True]
        if not ids:
            raise ExampleError("empty_example", "{example} has no tokens.")
        return ids, trained

    def _encode_text(self, example: TextExample) -> tuple[list[int], list[bool]]:
        """Special tokens in a text are the writer's own: BOS and EOS are added where they are missing."""
        encoding = self._encoding(example.text)
        ids = encoding.ids
        if ids[: len(self._prefix_ids)] != self._prefix_ids:
            ids = [*self._prefix_ids, *ids]
        if self.eos_id is not None and not self._ends_in_stop(example.text, encoding):
            ids = [*ids, self.eos_id]
        if not ids:
            raise ExampleError("empty_example", "{example} has no tokens.")
        return ids, [True] * len(ids)

    def _ends_in_stop(self, text: str, encoding: Encoding) -> bool:
        """Whether nothing but spaces follows a stop token."""
        ids = encoding.ids
        last = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in self.stop_ids), None)
        return last is not None and not text[encoding.offsets[last][1] :].strip()

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

    def _encoding(self, text: str) -> Encoding:
        return self._tokenizer.encode(checked_unicode(text), add_special_tokens=False)

    def _named_id(self, name: str) -> int | None:
        token = self._named_tokens.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)

    def _probe(
        self, turns: Sequence[tuple[str, str]], *, add_generation_prompt: bool = False
    ) -> str:
        """Render a small conversation; an empty text where the template refuses it."""
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            return self.render(messages, add_generation_prompt=add_generation_prompt)
        except TemplateError:
            return ""
