"""Which tokens end an answer, and which may not appear in a dataset's messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Protocol

from tokenizers import Tokenizer

_PROBE_ANSWER = "probed answer"
_ONE_ANSWER = (("user", "probed question"), ("assistant", _PROBE_ANSWER))
_ANSWER_AND_MORE = (*_ONE_ANSWER, ("user", "another question"))


class Probe(Protocol):
    """Renders a small conversation with the model's template; an empty text where that refuses it."""

    def __call__(
        self, turns: Sequence[tuple[str, str]], *, add_generation_prompt: bool = False
    ) -> str:
        """Return the text of these (role, content) turns."""
        ...


def find_stop_ids(
    tokenizer: Tokenizer, probe: Probe, declared: Iterable[int], *, vocab_size: int
) -> frozenset[int]:
    """Return the ids at which generation stops: those declared, and what the template writes after the last answer.

    Args:
        tokenizer: of the model.
        probe: see there.
        declared: EOS, and ``eos_token_id`` of the model's configs; ids that the model has not are left out.
        vocab_size: ids are below it.
    """
    tail = _after_answer(probe(_ONE_ANSWER))
    known = {token_id for token_id in declared if token_id < vocab_size}
    return frozenset(known | {*_written_tokens(tokenizer, tail)[:1]})


def find_turn_ends(tokenizer: Tokenizer, probe: Probe, stop_ids: frozenset[int]) -> frozenset[int]:
    """Return the ids that may end an assistant's turn: the stop ids, and one more in some templates.

    That of gpt-oss writes another token after an answer that others follow than after the last one. The
    token that begins the next turn is not one that ends this one.
    """
    text, prompt = probe(_ANSWER_AND_MORE), probe(_ANSWER_AND_MORE, add_generation_prompt=True)
    begins_turns = set(_ids(tokenizer, prompt.removeprefix(text)))
    ends = _written_tokens(tokenizer, _after_answer(text))[:1]
    return stop_ids | {token_id for token_id in ends if token_id not in begins_turns}


def _after_answer(text: str) -> str:
    return text.rpartition(_PROBE_ANSWER)[2] if _PROBE_ANSWER in text else ""


def _written_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the added tokens in a text that are not just spaces."""
    added = tokenizer.get_added_tokens_decoder()
    return [i for i in _ids(tokenizer, text) if i in added and not added[i].content.isspace()]


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def find_forbidden_tokens(
    tokenizer: Tokenizer, probe: Probe, stop_ids: frozenset[int]
) -> re.Pattern[str] | None:
    """Return a pattern of the tokens that messages may not contain as text: with them, they could forge a turn.

    These are the special tokens, and added tokens that the template writes around turns.
    """
    added = tokenizer.get_added_tokens_decoder()
    written = set(_ids(tokenizer, probe(_ANSWER_AND_MORE))) | stop_ids
    tokens = [
        token.content
        for token_id, token in added.items()
        if (token.special or token_id in written) and not token.content.isspace()
    ]
    longest_first = sorted((t for t in tokens if t), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def find_prefix_ids(tokenizer: Tokenizer) -> list[int]:
    """Return what the tokenizer writes before a plain text: BOS, or nothing."""
    bare = _ids(tokenizer, "a")
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    return []
