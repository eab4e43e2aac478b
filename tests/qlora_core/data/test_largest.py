"""The largest micro-batch, against all groups that are allowed."""

from __future__ import annotations

import itertools
import random

import pytest

from qlora_core.data.largest import largest_group


def _sizes(lengths: list[int], batch_size: int, max_tokens: int, *, packed: bool) -> dict[tuple[int, ...], int]:  # fmt: skip
    """The tokens of every group of examples that may share a micro-batch."""
    groups = [
        group
        for n in range(1, batch_size + 1)
        for group in itertools.combinations(range(len(lengths)), n)
    ]
    sizes = {
        group: sum(lengths[i] for i in group) if packed else len(group) * max(lengths[i] for i in group)
        for group in groups
    }  # fmt: skip
    return {g: size for g, size in sizes.items() if len(g) == 1 or size <= max_tokens}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_allowed_and_hardly_any_other_is_larger(seed: int, packed: bool) -> None:
    rng = random.Random(seed)
    lengths = [rng.choice([1, 2, 3, 5, 8, 13, 21, 40]) for _ in range(rng.randint(1, 7))]
    batch_size, max_tokens = rng.randint(1, 5), rng.randint(1, 30)

    found = largest_group(lengths, batch_size=batch_size, max_tokens=max_tokens, packed=packed)

    sizes = _sizes(lengths, batch_size, max_tokens, packed=packed)
    size = sizes[tuple(sorted(found))]
    assert [lengths[i] for i in found] == sorted((lengths[i] for i in found), reverse=True)
    if packed:
        assert size >= 0.75 * max(sizes.values())
    else:
        assert size == max(sizes.values())


def test_many_lengths_fill_a_packed_row() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(50, 900) for _ in range(500)]

    found = largest_group(lengths, batch_size=16, max_tokens=4096, packed=True)

    assert 4086 <= sum(lengths[i] for i in found) <= 4096


def test_an_example_over_the_bound_goes_alone() -> None:
    assert largest_group([3, 900, 4, 5], batch_size=4, max_tokens=16, packed=True) == [1]


@pytest.mark.parametrize("packed", [False, True])
def test_an_example_that_must_be_alone_is_never_with_others(packed: bool) -> None:
    lengths = [9, 10, 6, 7]

    found = largest_group(lengths, batch_size=4, max_tokens=40, packed=packed, alone_above=8)

    assert found == [3, 2]
