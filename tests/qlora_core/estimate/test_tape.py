"""Sizes alone, followed as autograd would: what is kept, for how long, and the peak."""

from __future__ import annotations

from qlora_core.estimate.operations import activate, add, multiply, scale, split
from qlora_core.estimate.tape import Ledger, Node, Tape, Value

FLOAT = 4


def trained(tape: Tape, elements: int) -> Value:
    """A value that needs a gradient."""
    return Value(tape.memory(elements * FLOAT), elements, FLOAT, Node((), (), lambda _: ()))


def test_a_value_counts_as_long_as_something_refers_to_it() -> None:
    ledger = Ledger()
    tape = Tape(ledger)

    value = tape.constant(10, FLOAT)
    other = value.memory
    del value
    before = ledger.live_bytes
    del other

    assert (before, ledger.live_bytes, ledger.peak_bytes) == (40, 0, 40)


def test_without_gradients_nothing_is_kept() -> None:
    ledger = Ledger()
    tape = Tape(ledger)

    x = activate(tape, activate(tape, tape.constant(10, FLOAT)))

    assert x.node is None
    assert ledger.live_bytes == 40


def test_what_an_activation_was_given_is_kept_until_its_backward_pass() -> None:
    ledger = Ledger()
    tape = Tape(ledger)

    y = activate(tape, scale(tape, trained(tape, 10)))
    kept = ledger.live_bytes
    last = y.node
    del y
    assert last is not None
    tape.run_backward(last, [tape.memory(40)])

    # The scaled value is kept for the activation; what was scaled is not.
    assert kept == 80
    assert ledger.live_bytes == 0


def test_a_value_used_twice_gets_its_gradients_added_in_new_memory() -> None:
    ledger = Ledger()
    tape = Tape(ledger)
    x = trained(tape, 10)
    first = x.node
    last = multiply(tape, x, x).node
    del x
    assert last is not None

    found = tape.run_backward(last, [tape.memory(40)], first)

    # At most: what is kept, and two gradients beside their sum.
    assert found is not None
    assert ledger.live_bytes == found.nbytes == 40
    assert ledger.peak_bytes == 40 + 3 * 40


def test_both_parts_of_a_sum_share_their_gradient() -> None:
    ledger = Ledger()
    tape = Tape(ledger)
    a, b = trained(tape, 10), trained(tape, 10)
    first = a.node
    last = add(tape, a, b).node
    del a, b
    assert last is not None
    assert ledger.live_bytes == 0

    found = tape.run_backward(last, [tape.memory(40)], first)

    assert found is not None
    assert ledger.live_bytes == 40


def test_the_parts_of_a_split_are_joined_by_one_copy() -> None:
    ledger = Ledger()
    tape = Tape(ledger)
    x = trained(tape, 10)
    first = x.node
    left, right = split(tape, x, [6, 4])
    del x
    last = multiply(tape, scale(tape, left), scale(tape, right)).node
    del left, right
    assert last is not None

    found = tape.run_backward(last, [tape.memory(24)], first)

    assert found is not None
    assert found.nbytes == 40
    del found
    assert ledger.live_bytes == 0


def test_what_is_not_recorded_is_not_kept_but_knows_that_it_needs_a_gradient() -> None:
    ledger = Ledger()
    tape = Tape(ledger, recording=False)

    y = activate(tape, scale(tape, trained(tape, 10)))

    assert y.node is not None
    assert ledger.live_bytes == 40
