"""A mixture of experts: the router, and every token through a few of them.

Stands for transformers' ``<Family>SparseMoeBlock.forward`` and `qlora_core.nn.nf4_experts.experts_forward`. Tokens are
taken to be spread evenly; the sum of what is kept does not depend on that.
"""

from __future__ import annotations

from qlora_core.estimate.architecture import Experts, Linear
from qlora_core.estimate.operations import (
    FLOAT32,
    INT64,
    activate,
    add,
    cast,
    gather,
    multiply,
    scale,
    split,
)
from qlora_core.estimate.products import Products, frozen, plain
from qlora_core.estimate.tape import Arrived, Gradients, Memory, Tape, Value


def through_experts(
    tape: Tape, hidden: Value, width: int, experts: Experts, products: Products
) -> Value:
    """Send each token through its experts.

    Args:
        tape: records.
        hidden: [tokens, width].
        width: of it.
        experts: of the layer.
        products: how their matrices are multiplied by.
    """
    tokens = hidden.elements // width
    weights, places = _route(tape, hidden, width, experts, tokens)
    return _mix(tape, hidden, width, experts, products, weights, places)


def _route(
    tape: Tape, hidden: Value, width: int, experts: Experts, tokens: int
) -> tuple[Value, Memory]:
    """Give the weights of each token's experts, and which they are."""
    logits = plain(tape, hidden, Linear("gate", experts.count, width))
    shares = activate(tape, cast(tape, logits, FLOAT32), keeps_result=True)
    places = tape.memory(tokens * experts.per_token * INT64)
    whole, kept = shares.nbytes, tokens * experts.per_token

    def backward(_: Arrived) -> Gradients:
        return [tape.memory(whole)]

    top = tape.record(
        tape.memory(kept * FLOAT32), kept, FLOAT32, [shares], backward, saved=[places]
    )
    return cast(tape, scale(tape, top), hidden.itemsize), places


def _mix(
    tape: Tape,
    hidden: Value,
    width: int,
    experts: Experts,
    products: Products,
    weights: Value,
    places: Memory,
) -> Value:
    """``experts_forward``."""
    tokens, assigned = hidden.elements // width, weights.elements
    memory = tape.memory(hidden.nbytes)
    out = Value(memory, hidden.elements, hidden.itemsize, None)
    order = [tape.memory(assigned * INT64), tape.memory(assigned * INT64)]
    reached = min(experts.count, assigned)
    up = Linear("gate_up_proj", 2 * experts.width, width)
    down = Linear("down_proj", width, experts.width)
    for index in range(reached):
        n = assigned // reached + (index < assigned % reached)
        chosen = tape.memory(n * INT64)
        x = gather(tape, hidden, n, width, places=chosen)
        x = frozen(tape, x, up, products)
        x = _gated(tape, x)
        x = frozen(tape, x, down, products)
        x = multiply(tape, x, gather(tape, weights, n, 1))
        out = _added(tape, out, x, n * width * hidden.itemsize, chosen)
    del order, places, tokens
    return out


def _gated(tape: Tape, x: Value) -> Value:
    gate, value = split(tape, x, [x.elements // 2, x.elements // 2])
    return multiply(tape, activate(tape, gate), value)


def _added(tape: Tape, out: Value, x: Value, nbytes: int, chosen: Memory) -> Value:
    """``out.index_add_``: in place; keeps ``x`` for its shape alone, whose gradient is taken by rows."""
    return tape.record(
        out.memory, out.elements, out.itemsize, [out, x],
        lambda grad: [grad[0], tape.memory(nbytes)], saved=[chosen, x.memory],
    )  # fmt: skip


def shared(tape: Tape, mixed: Value, own: Value, gate: Value) -> Value:
    """Add the expert of all tokens, weighed by its gate's sigmoid."""
    weight = activate(tape, gate, keeps_result=True)
    return add(tape, mixed, multiply(tape, own, weight))
