"""How the tokens of a forward pass lie, and the largest forward pass that a run can have."""

from __future__ import annotations

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


def largest_rows(
    settings: TrainSettings,
    *,
    longest_tokens: int,
    mean_tokens: float,
    trained_share: float,
    alone_above: int | None,
) -> Rows:
    """Give the forward pass with the most tokens that a step may have, as the trial before a run takes it.

    Packed, it is taken for the longest example and usual ones that fill the row up, the last of them to its end; padded,
    for rows as long as the longest example.

    Args:
        settings: of the run.
        longest_tokens: of the longest example.
        mean_tokens: of an example.
        trained_share: of the tokens, how many carry loss.
        alone_above: a longer example shares a row with none.
    """
    most = settings.batch_size
    if alone_above is not None and longest_tokens > alone_above:
        most = 1
    room = settings.micro_batch_tokens
    if not settings.packing:
        count = max(1, min(most, room // longest_tokens))
        return Rows(
            count, longest_tokens, None, _trained(count * longest_tokens, count, trained_share)
        )
    usual = max(1, round(mean_tokens))
    lengths = [longest_tokens]
    while len(lengths) < most and sum(lengths) + usual <= room:
        lengths.append(usual)
    rest = room - sum(lengths)
    if len(lengths) < most and usual < longest_tokens and rest > 0:
        lengths.append(rest)
    tokens = sum(lengths)
    return Rows(1, tokens, tuple(lengths), _trained(tokens, len(lengths), trained_share))


def _trained(tokens: int, examples: int, share: float) -> int:
    """The first token of an example is never trained."""
    return max(1, min(tokens - examples, round(tokens * share)))
