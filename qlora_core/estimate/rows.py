"""How the tokens of a forward pass lie, and the pass of a step that may take most memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qlora_core.estimate.settings import TrainSettings


@dataclass(frozen=True)
class Rows:
    """The tokens of one forward pass.

    Attributes:
        count: of rows.
        width: of each, padding counted.
        lengths: of the examples that fill the one row; None for padded rows.
        trained: tokens that carry loss.
    """

    count: int
    width: int
    lengths: tuple[int, ...] | None
    trained: int

    @property
    def tokens(self) -> int:
        """All of them, padding counted."""
        return self.count * self.width

    @property
    def examples(self) -> int:
        """How many there are."""
        return self.count if self.lengths is None else len(self.lengths)


@dataclass(frozen=True)
class Examples:
    """What is known of a run's examples.

    Attributes:
        longest: in tokens.
        mean: in tokens.
        trained_share: of the tokens, how many carry loss.
        alone_above: a longer one shares a pass with none; None for no limit.
    """

    longest: int
    mean: float
    trained_share: float
    alone_above: int | None

    @property
    def usual(self) -> int:
        """Tokens of one that is neither long nor short."""
        return max(1, round(self.mean))

    def trained(self, tokens: int, examples: int) -> int:
        """Give how many of some tokens carry loss; the first of an example never does."""
        return max(1, min(tokens - examples, round(tokens * self.trained_share)))


def largest_pass(settings: TrainSettings, examples: Examples) -> Rows:
    """Give the forward pass with the most tokens that a step may have, as the trial before a run takes it.

    Packed, it is taken for the longest example and usual ones that fill the row up, the last of them to its end; padded,
    for rows as long as the longest example.
    """
    most = settings.batch_size
    if examples.alone_above is not None and examples.longest > examples.alone_above:
        most = 1
    room = settings.micro_batch_tokens
    if not settings.packing:
        count = max(1, min(most, room // examples.longest))
        tokens = count * examples.longest
        return Rows(count, examples.longest, None, examples.trained(tokens, count))
    lengths = [examples.longest]
    while len(lengths) < most and sum(lengths) + examples.usual <= room:
        lengths.append(examples.usual)
    rest = room - sum(lengths)
    if len(lengths) < most and examples.usual < examples.longest and rest > 0:
        lengths.append(rest)
    return _packed(lengths, examples)


def count_passes(settings: TrainSettings, examples: Examples, largest: Rows) -> int:
    """Return the passes that a usual step takes."""
    length = examples.usual if settings.packing else examples.longest
    fitting = max(1, settings.micro_batch_tokens // length)
    return max(
        math.ceil(settings.batch_size / fitting), 1 + (settings.batch_size > largest.examples)
    )


def _packed(lengths: list[int], examples: Examples) -> Rows:
    tokens = sum(lengths)
    return Rows(1, tokens, tuple(lengths), examples.trained(tokens, len(lengths)))
