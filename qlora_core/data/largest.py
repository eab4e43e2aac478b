"""The largest micro-batch that can come, for trying whether it fits memory."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence

from qlora_core.data.batches import Batch, Batching, collate, pack
from qlora_core.data.dataset import Dataset


def largest_possible(batching: Batching, dataset: Dataset, *, batch_size: int) -> Batch:
    """Return the micro-batch with the most tokens that a step of ``batch_size`` examples may have."""
    group = largest_group(
        dataset.lengths,
        batch_size=batch_size,
        max_tokens=batching.max_tokens,
        packed=batching.packed,
        alone_above=batching.alone_above,
    )
    if batching.packed:
        return pack(dataset, group)
    return collate(dataset, group, pad_id=batching.pad_id)


def largest_group(
    lengths: Sequence[int],
    *,
    batch_size: int,
    max_tokens: int,
    packed: bool,
    alone_above: int | None = None,
) -> list[int]:
    """Return the examples of that micro-batch, the longest first.

    Padded, no allowed group is larger. Packed, only examples are put together that are neighbours in
    length, so a row may come that is fuller by a few tokens.

    Args:
        lengths: of all examples, in tokens.
        batch_size: examples of a micro-batch at most.
        max_tokens: of a micro-batch, padding included; a longer example gets one of its own.
        packed: whether examples follow each other in one row, instead of being padded to the longest.
        alone_above: a longer example gets one of its own, too.
    """
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    falling = [lengths[index] for index in longest_first]
    sums = [0, *itertools.accumulate(falling)]
    together = 0
    if alone_above is not None:
        together = bisect_left(falling, -alone_above, key=lambda length: -length)
    best, best_size = longest_first[:1], falling[0]
    for n in range(2, min(batch_size, len(lengths)) + 1):

        def size(start: int, n: int = n) -> int:
            return sums[start + n] - sums[start] if packed else n * falling[start]

        # Sizes fall from start to start; the first group that is allowed is the largest of so many.
        starts = range(len(lengths) - n + 1)
        start = bisect_left(starts, -max_tokens, lo=together, key=lambda start: -size(start))
        if start < len(starts) and size(start) > best_size:
            best, best_size = longest_first[start : start + n], size(start)
    return best
