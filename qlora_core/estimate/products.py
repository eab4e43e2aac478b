"""Matrix products of the engine: a frozen weight, dense or in NF4, with an adapter or without.

They stand for `qlora_core.nn.lora.LoraLinearFn` and `qlora_core.nn.nf4_linear.NF4LinearFn`; names here live as long as
theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_core.estimate.architecture import Linear
from qlora_core.estimate.operations import FLOAT32
from qlora_core.estimate.tape import Arrived, Gradients, Memory, Tape, Value


@dataclass(frozen=True)
class Products:
    """How a run multiplies.

    A trained tensor's gradient is added to the optimizer's buffer at once and not kept.

    Attributes:
        itemsize: of the numbers that are multiplied.
        makes_dense: whether each product makes the quantized weight dense in new memory; a CPU keeps a buffer for that
            from product to product, which is counted beside the activations.
        dropout: whether the adapters drop some of their inputs.
        has_copies: whether the optimizer keeps copies of the adapters' factors in what is multiplied, so that none is cast.
    """

    itemsize: int
    makes_dense: bool
    dropout: bool
    has_copies: bool

    def dense(self, tape: Tape, linear: Linear) -> Memory | None:
        """Make a quantized weight dense."""
        return tape.memory(linear.elements * self.itemsize) if self.makes_dense else None


def adapted(
    tape: Tape,
    x: Value,
    linear: Linear,
    rank: int,
    products: Products,
    *,
    quantized: bool = True,
) -> Value:
    """``LoraLinearFn``: keeps x and the small product; drops and makes dense again on the way back."""
    size, x_size, rows = products.itemsize, x.itemsize, x.elements // linear.in_features
    wide, narrow, result = rows * linear.in_features, rows * rank, rows * linear.out_features
    factors = (rank * linear.in_features, linear.out_features * rank)
    x_needs, is_cast = x.node is not None, x.itemsize != products.itemsize
    factors_are_cast = size != FLOAT32 and not products.has_copies

    def backward(grad: Arrived) -> Gradients:
        held = [tape.memory(result * size)] if is_cast else list(grad)
        held += [tape.memory(one * size) for one in factors if factors_are_cast]
        held.append(tape.memory(narrow * size))
        inputs = [tape.memory(wide * size) for made in (is_cast, products.dropout) if made]
        of_a = _in_float32(tape, factors[0], size)
        inputs.clear()
        of_b = _in_float32(tape, factors[1], size)
        of_x = None
        if x_needs:
            weight = products.dense(tape, linear) if quantized else None
            of_x = tape.memory(wide * size)
            del weight
            if products.dropout:
                inputs += [tape.memory(wide * size), tape.memory(wide * size)]
                inputs.clear()
            if is_cast:
                of_x = tape.memory(wide * x_size)
        held.clear()
        del of_a, of_b
        return [of_x]

    x_product = tape.memory(wide * size) if is_cast else x.memory
    inputs = [tape.memory(wide * size)] if products.dropout else []
    inputs += [tape.memory(factors[0] * size)] if factors_are_cast else []
    down = tape.memory(narrow * size)
    inputs.clear()
    weight = products.dense(tape, linear) if quantized else None
    y = tape.memory(result * size)
    del weight
    if factors_are_cast:
        inputs.append(tape.memory(factors[1] * size))
        inputs.clear()
    if is_cast:
        y = tape.memory(result * x_size)
    del x_product
    return tape.record(y, result, x_size, [x], backward, saved=[x.memory, down], trains=True)


def frozen(tape: Tape, x: Value, linear: Linear, products: Products) -> Value:
    """``NF4LinearFn``: keeps nothing."""
    size, x_size = products.itemsize, x.itemsize
    wide, result = x.elements, x.elements // linear.in_features * linear.out_features

    def backward(grad: Arrived) -> Gradients:
        weight = products.dense(tape, linear)
        held = tape.memory(result * size) if size != x_size else grad[0]
        of_x = tape.memory(wide * size)
        del held, weight
        return [of_x if size == x_size else tape.memory(wide * x_size)]

    weight = products.dense(tape, linear)
    x_product = tape.memory(wide * size) if size != x_size else x.memory
    y = tape.memory(result * size)
    del weight, x_product
    if size != x_size:
        y = tape.memory(result * x_size)
    return tape.record(y, result, x_size, [x], backward)


def plain(tape: Tape, x: Value, linear: Linear) -> Value:
    """A dense layer of torch that nothing trains: keeps nothing of x."""
    nbytes, result = x.nbytes, x.elements // linear.in_features * linear.out_features
    memory = tape.memory(result * x.itemsize)
    return tape.record(memory, result, x.itemsize, [x], lambda _: [tape.memory(nbytes)])


def _in_float32(tape: Tape, elements: int, itemsize: int) -> Memory:
    found = tape.memory(elements * itemsize)
    return found if itemsize == FLOAT32 else tape.memory(elements * FLOAT32)
