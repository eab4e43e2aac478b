"""The operations that decoders are made of: what each allocates, keeps, and allocates again on the way back.

Each function stands for one or a few calls of torch, in their order. None of the closures that stand for a backward pass
refers to a value: only what is named as saved is kept.
Source of what autograd keeps: PyTorch, ``tools/autograd/derivatives.yaml``.
"""

from __future__ import annotations

from collections.abc import Sequence

from qlora_core.estimate.tape import Arrived, Gradients, Memory, Tape, Value

FLOAT32 = 4
INT64 = 8


def part(tape: Tape, x: Value, elements: int) -> Value:
    """``x[..., a:b]``: a view, whose gradient is put into zeros as large as all of ``x``."""
    whole = x.nbytes
    return tape.record(x.memory, elements, x.itemsize, [x], lambda _: [tape.memory(whole)])


def split(tape: Tape, x: Value, sizes: Sequence[int]) -> list[Value]:
    """``x.split(sizes)``: views, whose gradients wait for each other and are copied into one."""
    nbytes, waiting = x.nbytes, list[Memory]()

    def backward(_: Arrived) -> Gradients:
        joined = tape.memory(nbytes)
        waiting.clear()
        return [joined]

    def wait(grad: Arrived) -> Gradients:
        waiting.append(grad[0])
        return [tape.memory(0)]

    whole = tape.record(x.memory, x.elements, x.itemsize, [x], backward)
    return [tape.record(x.memory, size, x.itemsize, [whole], wait) for size in sizes]


def concatenate(tape: Tape, parts: Sequence[Value]) -> Value:
    """``torch.cat``: new memory; the gradients of the parts are views of the whole's."""
    elements, itemsize, n = sum(one.elements for one in parts), parts[0].itemsize, len(parts)
    memory = tape.memory(elements * itemsize)
    return tape.record(memory, elements, itemsize, parts, lambda grad: [grad[0]] * n)


def cast(tape: Tape, x: Value, itemsize: int) -> Value:
    """``x.to(dtype)``: itself where the size fits, else a copy; so its gradient."""
    if itemsize == x.itemsize:
        return x
    nbytes, elements = x.nbytes, x.elements
    memory = tape.memory(elements * itemsize)
    return tape.record(memory, elements, itemsize, [x], lambda _: [tape.memory(nbytes)])


def laid_out_anew(tape: Tape, x: Value) -> Value:
    """A view whose gradient does not fit the old shape as it lies and is copied."""
    nbytes = x.nbytes
    return tape.record(x.memory, x.elements, x.itemsize, [x], lambda _: [tape.memory(nbytes)])


def copy(tape: Tape, x: Value) -> Value:
    """``x.contiguous()`` of what does not lie so; the gradient is passed on as it is."""
    memory = tape.memory(x.nbytes)
    return tape.record(memory, x.elements, x.itemsize, [x], lambda grad: [grad[0]])


def add(tape: Tape, a: Value, b: Value) -> Value:
    """``a + b``: both get the same gradient."""
    memory = tape.memory(a.nbytes)
    return tape.record(memory, a.elements, a.itemsize, [a, b], lambda grad: [grad[0], grad[0]])


def scale(tape: Tape, x: Value, by: Memory | None = None) -> Value:
    """``x`` times a number or something frozen that is there anyway; a constant ``by`` is kept."""
    nbytes = x.nbytes
    memory = tape.memory(nbytes)
    return tape.record(
        memory, x.elements, x.itemsize, [x], lambda _: [tape.memory(nbytes)],
        saved=() if by is None else [by],
    )  # fmt: skip


def multiply(tape: Tape, a: Value, b: Value) -> Value:
    """``a * b``, with ``b`` as large or a number per row: each is kept for the gradient of the other."""
    large, small = a.nbytes, b.nbytes
    a_needs, b_needs = a.node is not None, b.node is not None

    def backward(_: Arrived) -> Gradients:
        of_a = tape.memory(large) if a_needs else None
        of_b = tape.memory(large) if b_needs else None
        if of_b is not None and small < large:
            summed = tape.memory(small)
            of_b = summed
        return [of_a, of_b]

    saved = [*([b.memory] if a_needs else []), *([a.memory] if b_needs else [])]
    memory = tape.memory(large)
    return tape.record(memory, a.elements, a.itemsize, [a, b], backward, saved=saved)


def activate(tape: Tape, x: Value, *, keeps_result: bool = False) -> Value:
    """SiLU or GELU, which keep what they are given; or tanh, sigmoid and softmax, which keep what they give."""
    nbytes = x.elements * x.itemsize
    memory = tape.memory(nbytes)
    return tape.record(
        memory, x.elements, x.itemsize, [x], lambda _: [tape.memory(nbytes)],
        saved=[memory if keeps_result else x.memory],
    )  # fmt: skip


def square(tape: Tape, x: Value) -> Value:
    """``x.pow(2)``; its gradient is ``grad * (2 * x.pow(1))``, a tensor for each of the three."""
    nbytes = x.nbytes

    def backward(_: Arrived) -> Gradients:
        power = tape.memory(nbytes)
        doubled = tape.memory(nbytes)
        product = tape.memory(nbytes)
        del power, doubled
        return [product]

    memory = tape.memory(nbytes)
    return tape.record(memory, x.elements, x.itemsize, [x], backward, saved=[x.memory])


def mean(tape: Tape, x: Value, rows: int) -> Value:
    """``x.mean(-1)``: one number per row, and a whole tensor on the way back."""
    nbytes = x.nbytes
    memory = tape.memory(rows * x.itemsize)
    return tape.record(memory, rows, x.itemsize, [x], lambda _: [tape.memory(nbytes)])


def norm(tape: Tape, x: Value, rows: int, kind: str) -> Value:
    """A root mean square norm in float32 over ``rows`` rows of ``x``; "plain" is a layer norm.

    Kinds as in `families.Family.norm`; the code they stand for lies in transformers' ``<Family>RMSNorm.forward``.
    """
    itemsize = x.itemsize
    exact = cast(tape, x, FLOAT32)
    if kind == "plain":
        return cast(tape, _layer_norm(tape, exact, rows), itemsize)
    variance = mean(tape, square(tape, exact), rows)
    normed = multiply(tape, exact, activate(tape, scale(tape, variance), keeps_result=True))
    del exact
    if kind == "llama":
        return scale(tape, cast(tape, normed, itemsize))
    normed = scale(tape, normed)
    return cast(tape, normed, itemsize)


def _layer_norm(tape: Tape, x: Value, rows: int) -> Value:
    nbytes = x.nbytes
    memory, statistics = tape.memory(nbytes), tape.memory(2 * rows * FLOAT32)
    return tape.record(
        memory, x.elements, x.itemsize, [x], lambda _: [tape.memory(nbytes)],
        saved=[x.memory, statistics],
    )  # fmt: skip


def gather(tape: Tape, x: Value, rows: int, width: int, *, places: Memory | None = None) -> Value:
    """``x[places]``: keeps the places; its gradient is put into zeros and, by torch, copied with them."""
    nbytes = x.nbytes
    memory = tape.memory(rows * width * x.itemsize)

    def backward(_: Arrived) -> Gradients:
        zeros = tape.memory(nbytes)
        filled = tape.memory(nbytes)
        del zeros
        return [filled]

    saved = [] if places is None else [places]
    return tape.record(memory, rows * width, x.itemsize, [x], backward, saved=saved)
