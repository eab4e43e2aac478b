"""The largest micro-batch that can come, for trying whether it fits memory."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence

import torch

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
    # Tensors, since there may be millions.
    is_flat = isinstance(lengths, array) and lengths.typecode == "i"
    of_all = torch.frombuffer(lengths, dtype=torch.int32) if is_flat else torch.tensor(lengths)
    falling, longest_first = of_all.sort(descending=True, stable=True)
    sums = torch.cat([torch.zeros(1, dtype=torch.int64), falling.cumsum(0)])
    together = 0 if alone_above is None else int((falling > alone_above).sum())
    best, best_size = [int(longest_first[0])], int(falling[0])
    for n in range(2, min(batch_size, len(lengths)) + 1):

        def size(start: int, n: int = n) -> int:
            return int(sums[start + n] - sums[start]) if packed else n * int(falling[start])

        # Sizes fall from start to start; the first group that is allowed is the largest of so many.
        starts = range(len(lengths) - n + 1)
        start = bisect_left(starts, -max_tokens, lo=together, key=lambda start: -size(start))
        if start < len(starts) and size(start) > best_size:
            best, best_size = longest_first[start : start + n].tolist(), size(start)
    return best
