"""Reading a finished job's events."""

from typing import Any

import pytest

from operations.demo.outcome import read_outcome


def _step(step: int, loss: float) -> dict[str, Any]:
    return {"type": "metrics", "message": "", "data": {"step": step, "train_loss": loss}}


def _validation(step: int, loss: float | None) -> dict[str, Any]:
    return {"type": "metrics", "message": "", "data": {"step": step, "full_valid_loss": loss}}


def _samples(stage: str, answer: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": "What is it?"}]
    samples = [{"messages": messages, "answer": answer}]
    data = {"kind": "samples_generated", "step": 0, "stage": stage, "samples": samples}
    return {"type": "message", "message": "", "data": data}


def test_the_ends_are_means_over_ten_steps_and_validation_is_the_first_and_the_last() -> None:
    steps = [_step(n, float(n)) for n in range(1, 101)]
    events = [_validation(0, 5.0), *steps[:50], _validation(50, 3.0), *steps[50:]]

    outcome = read_outcome([*events, _validation(100, 2.5)])

    assert outcome.steps == 100
    assert outcome.averaged_steps == 10
    assert outcome.first_train_loss == pytest.approx(5.5)  # mean of 1 to 10
    assert outcome.last_train_loss == pytest.approx(95.5)  # mean of 91 to 100
    assert (outcome.first_valid_loss, outcome.last_valid_loss) == (5.0, 2.5)
    assert outcome.improved


def test_the_two_ends_of_a_short_run_do_not_overlap() -> None:
    outcome = read_outcome([_step(n, float(n)) for n in range(1, 9)])

    assert outcome.averaged_steps == 2
    assert (outcome.first_train_loss, outcome.last_train_loss) == (1.5, 7.5)


def test_a_step_trained_twice_counts_as_the_newest_attempt_tells_it() -> None:
    outcome = read_outcome([_step(1, 9.0), _step(2, 8.0), _step(2, 4.0)])

    assert outcome.last_train_loss == 4.0


def test_answers_of_base_and_adapter_stand_side_by_side() -> None:
    outcome = read_outcome([_samples("base", "no idea"), _step(1, 1.0), _samples("adapter", "it")])

    (answer,) = outcome.answers
    assert (answer.question, answer.base, answer.adapter) == ("What is it?", "no idea", "it")


@pytest.mark.parametrize(
    "events",
    [
        [],
        [_validation(0, 2.0)],
        [_validation(0, 2.0), _validation(9, 2.0)],
        [_validation(0, 2.0), _validation(9, 3.0)],
        [_validation(0, None), _validation(9, 1.0)],
    ],
    ids=["nothing", "only the start", "the same", "a rise", "a loss that was no number"],
)
def test_no_fall_is_no_improvement(events: list[dict[str, Any]]) -> None:
    assert not read_outcome(events).improved
