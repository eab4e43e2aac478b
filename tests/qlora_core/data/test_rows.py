"""Packing by best fit: every example in one row, no row too long, close to the fewest rows."""

from __future__ import annotations

import itertools
import random
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_core.data import pack_rows


def test_each_example_goes_where_the_least_room_is_left() -> None:
    lengths = [6, 3, 5, 4, 2, 7]

    rows = pack_rows(range(6), lengths, max_tokens=10)

    # 4 fills the row of 6 and 3 that of 7, though that of 5 had room for both.
    assert rows == [[0, 3], [5, 1], [2, 4]]


def test_a_longer_example_than_a_row_is_alone_and_first() -> None:
    assert pack_rows(range(3), [5, 30, 5], max_tokens=10) == [[1], [0, 2]]


def test_an_example_above_the_limit_shares_no_row() -> None:
    lengths = [8, 3, 9, 2, 8]

    rows = pack_rows(range(5), lengths, max_tokens=20, alone_above=8)

    assert rows == [[0, 4, 1], [2], [3]]


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    max_tokens=st.integers(1, 100),
    alone_above=st.none() | st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_rows_hold_every_example_once_and_do_not_depend_on_their_order(
    lengths: list[int], max_tokens: int, alone_above: int | None, seed: int
) -> None:
    shuffled = random.Random(seed).sample(range(len(lengths)), len(lengths))

    rows = pack_rows(shuffled, lengths, max_tokens=max_tokens, alone_above=alone_above)

    assert rows == pack_rows(
        range(len(lengths)), lengths, max_tokens=max_tokens, alone_above=alone_above
    )
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in row) for row in rows]
    assert totals == sorted(totals, reverse=True)
    for row, total in zip(rows, totals, strict=True):
        assert len(row) == 1 or total <= max_tokens
        assert len(row) == 1 or alone_above is None or max(lengths[i] for i in row) <= alone_above


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_few(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [min(2048, int(draw.lognormvariate(5, 1)) + 8) for _ in range(500)]

    rows = pack_rows(range(500), lengths, max_tokens=2048)

    assert len(rows) <= ceil(11 / 9 * ceil(sum(lengths) / 2048)) + 1
    assert sum(lengths) > 0.95 * 2048 * (len(rows) - 1)
