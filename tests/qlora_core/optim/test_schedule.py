"""Each schedule against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from qlora_core.errors import ConfigError
from qlora_core.optim import learning_rate_at, warmup_share


def _rates(kind: str, total_steps: int, warmup_steps: int) -> list[float]:
    return [
        learning_rate_at(
            step, kind=kind, peak=8.0, total_steps=total_steps, warmup_steps=warmup_steps
        )
        for step in range(total_steps)
    ]


def test_linear_rises_over_the_warm_up_and_falls_towards_zero() -> None:
    assert _rates("linear", 12, 4) == [2, 4, 6, 8, 8, 7, 6, 5, 4, 3, 2, 1]


def test_cosine_falls_as_half_a_wave() -> None:
    half = math.sqrt(0.5)

    rates = _rates("cosine", 6, 2)

    assert rates == pytest.approx([4, 8, 8, 4 * (1 + half), 4, 4 * (1 - half)])


def test_constant_stays_at_the_peak() -> None:
    assert _rates("constant", 5, 2) == [4, 8, 8, 8, 8]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_without_a_warm_up_the_first_step_is_at_the_peak(kind: str) -> None:
    assert _rates(kind, 4, 0)[0] == 8


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_all_of_it_may_be_warm_up(kind: str) -> None:
    assert _rates(kind, 2, 2) == [4, 8]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_a_warm_up_longer_than_the_run_ends_below_the_peak(kind: str) -> None:
    assert _rates(kind, 2, 4) == [2, 4]


@pytest.mark.parametrize(
    ("ratio", "total_steps", "steps"),
    [(0.0, 100, 0), (0.001, 100, 1), (0.011, 100, 2), (0.07, 100, 7), (1 / 3, 12, 4), (1.0, 7, 7)],
)
def test_a_part_of_a_warm_up_step_is_a_whole_one(
    ratio: float, total_steps: int, steps: int
) -> None:
    assert warmup_share(ratio, total_steps) == steps


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match="linear, cosine, constant, not 'step'"):
        learning_rate_at(0, kind="step", peak=1.0, total_steps=1, warmup_steps=0)
