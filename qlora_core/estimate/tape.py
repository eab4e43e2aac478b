"""Follows a forward and a backward pass as autograd does, with sizes in the place of tensors.

A `Memory` counts while something refers to it, as a tensor's does in torch: operations and layers are written so that
their variables live as long as those of the code they stand for, and CPython frees what nothing refers to at once.
So each byte of the peak is that of one named tensor, and no share of anything is guessed.

How torch works, which this follows: a node of the graph keeps what its backward pass needs until that has run; nodes run
in the reverse order of their making; the gradient of a value that was used twice is added up in new memory.
Source: PyTorch, ``torch/csrc/autograd/engine.cpp`` and ``input_buffer.cpp``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

SMALLEST_ON_HOST = 64 * 1024
"""Bytes of a tensor that is worth a copy to the host and back, as in `qlora_core.train.memory.host_memory`."""


class Ledger:
    """Bytes alive now, and at most so far."""

    def __init__(self) -> None:
        self.live_bytes = 0
        self.peak_bytes = 0


class Memory:
    """The memory of one tensor, and of all views of it."""

    __slots__ = ("_ledger", "nbytes")

    def __init__(self, ledger: Ledger, nbytes: int) -> None:
        self._ledger = ledger
        self.nbytes = nbytes
        ledger.live_bytes += nbytes
        ledger.peak_bytes = max(ledger.peak_bytes, ledger.live_bytes)

    def __del__(self) -> None:
        self._ledger.live_bytes -= self.nbytes


Gradients = Sequence["Memory | None"]
"""For each input of an operation, None where none is wanted."""

Arrived = list["Memory"]
"""The one gradient that a node is given, in a list, so that who passes it on can let go of it."""


class Node:
    """What one operation left for the backward pass.

    Args:
        inputs: the nodes of its inputs, None for one without gradient.
        saved: kept until its backward pass has run.
        away: bytes of what is kept elsewhere until its backward pass runs.
        backward: from its result's gradient to those of its inputs, in order.
    """

    __slots__ = ("away", "backward", "inputs", "saved")

    def __init__(
        self,
        inputs: Sequence[Node | None],
        saved: Sequence[Memory],
        backward: Callable[[Arrived], Gradients],
        away: Sequence[int] = (),
    ) -> None:
        self.away = away
        self.inputs: Sequence[Node | None] = inputs
        self.saved: Sequence[Memory] = saved
        self.backward: Callable[[Arrived], Gradients] | None = backward


class Value:
    """A tensor of a forward pass.

    Attributes:
        memory: shared with those it is a view of.
        elements: its own; of a view they may be fewer than the memory holds.
        itemsize: bytes of one.
        node: what made it, None where it needs no gradient.
    """

    __slots__ = ("elements", "itemsize", "memory", "node")

    def __init__(self, memory: Memory, elements: int, itemsize: int, node: Node | None) -> None:
        self.memory = memory
        self.elements = elements
        self.itemsize = itemsize
        self.node = node

    @property
    def nbytes(self) -> int:
        """Of its elements."""
        return self.elements * self.itemsize

    @property
    def maker(self) -> Node:
        """What made it, of a value that needs a gradient."""
        if self.node is None:
            raise ValueError("this value needs no gradient")
        return self.node


class Tape:
    """Makes memory and records what the backward pass will need.

    Args:
        ledger: counts the memory.
        recording: False where nothing is kept, as in the first pass over what is computed again later.
        on_host: whether what is kept for the backward pass is in the host's memory until then, all but the smallest.
    """

    def __init__(self, ledger: Ledger, *, recording: bool = True, on_host: bool = False) -> None:
        self.ledger = ledger
        self.on_host = on_host
        self._recording = recording
        self._nodes: list[Node] = []

    def memory(self, nbytes: int) -> Memory:
        """Allocate."""
        return Memory(self.ledger, nbytes)

    def constant(self, elements: int, itemsize: int) -> Value:
        """Make a value without gradient."""
        return Value(self.memory(elements * itemsize), elements, itemsize, None)

    def record(
        self,
        memory: Memory,
        elements: int,
        itemsize: int,
        inputs: Sequence[Value],
        backward: Callable[[Arrived], Gradients],
        *,
        saved: Sequence[Memory] = (),
        trains: bool = False,
    ) -> Value:
        """Make an operation's result.

        Args:
            memory: of the result.
            elements: of the result.
            itemsize: of the result.
            inputs: of the operation.
            backward: gives a gradient for each of ``inputs``.
            saved: kept for ``backward``.
            trains: whether the operation has trained parameters, so that its result always needs a gradient.
        """
        nodes = [value.node for value in inputs]
        if not trains and not any(nodes):
            return Value(memory, elements, itemsize, None)
        if not self._recording:
            return Value(memory, elements, itemsize, Node(nodes, (), backward))
        moved = [one for one in saved if self.on_host and one.nbytes >= SMALLEST_ON_HOST]
        here = [one for one in saved if one not in moved]
        node = Node(nodes, here, backward, [one.nbytes for one in moved])
        self._nodes.append(node)
        return Value(memory, elements, itemsize, node)

    def run_backward(
        self, last: Node, arrived: Arrived, first: Node | None = None
    ) -> Memory | None:
        """Go back from ``last``, freeing what was kept on the way.

        Args:
            last: the node to begin at.
            arrived: the gradient of its result; taken out.
            first: stands for an input from outside, whose gradient is returned.
        """
        waiting: dict[Node, Memory] = {last: arrived.pop()}
        while self._nodes:
            node = self._nodes.pop()
            if node not in waiting or node.backward is None:
                continue
            back = [self.memory(nbytes) for nbytes in node.away]
            gradients = list(node.backward([waiting.pop(node)]))
            del back
            node.saved, node.backward = (), None
            for place, into in enumerate(node.inputs):
                found, gradients[place] = gradients[place], None
                if into is None or found is None:
                    continue
                before = waiting.pop(into, None)
                waiting[into] = found if before is None else self.memory(found.nbytes)
                del before, found
        return None if first is None else waiting.get(first)
