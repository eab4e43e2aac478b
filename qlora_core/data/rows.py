"""How the examples of an optimizer step are put into rows of bounded length, by best fit, largest first."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def pack_rows(
    indices: Sequence[int],
    lengths: Sequence[int],
    *,
    max_tokens: int,
    alone_above: int | None = None,
) -> list[list[int]]:
    """Put examples into rows, each where the least room is left over; the fullest row comes first.

    Args:
        indices: of the examples, in any order.
        lengths: of all examples, in tokens.
        max_tokens: of a row; a longer example gets a row of its own.
        alone_above: a longer example shares its row with none, and none with it.

    Returns:
        Rows of indices. They depend on which examples there are, not on their order.

    Source: best-fit decreasing, at most 11/9 of the fewest rows plus a constant (Johnson, "Near-optimal bin
    packing algorithms", 1973).
    """
    # The index settles ties.
    longest_first = sorted(indices, key=lambda i: (-lengths[i], i))
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # room left and number of the row, sorted
    for index in longest_first:
        length = lengths[index]
        is_alone = alone_above is not None and length > alone_above
        place = len(open_rows) if is_alone else bisect.bisect_left(open_rows, (length, -1))
        if place < len(open_rows):
            room, row = open_rows.pop(place)
            rows[row].append(index)
        else:
            room, row = max_tokens, len(rows)
            rows.append([index])
        if not is_alone and room > length:
            bisect.insort(open_rows, (room - length, row))
    return sorted(rows, key=lambda row: (-sum(lengths[i] for i in row), row[0]))
