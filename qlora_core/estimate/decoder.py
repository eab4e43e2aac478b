"""The decoder's forward pass, layer by layer, and the passes over it that checkpointing makes.

Stands for transformers' ``<Family>DecoderLayer.forward`` and ``<Family>Model.forward``.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_core.estimate.adapter import Adapter
from qlora_core.estimate.architecture import Architecture, Layer
from qlora_core.estimate.attention import Project, attend
from qlora_core.estimate.experts import shared, through_experts
from qlora_core.estimate.operations import (
    FLOAT32,
    activate,
    add,
    cast,
    multiply,
    norm,
    scale,
    split,
)
from qlora_core.estimate.products import Products, adapted, frozen
from qlora_core.estimate.rows import Rows
from qlora_core.estimate.tape import (
    SMALLEST_ON_HOST,
    Arrived,
    Gradients,
    Memory,
    Node,
    Tape,
    Value,
)


@dataclass(frozen=True)
class Decoder:
    """A model and how it is run.

    Attributes:
        model: what it is made of.
        adapter: what is trained of it.
        products: how it multiplies.
        rows: of the forward pass.
        itemsize: of hidden states.
        checkpointing: whether layers are computed again on the way back, instead of keeping what they made.
        on_gpu: which kernels run.
    """

    model: Architecture
    adapter: Adapter
    products: Products
    rows: Rows
    itemsize: int
    checkpointing: bool
    on_gpu: bool

    def forward(self, tape: Tape) -> Value:
        """Give the hidden states [tokens, hidden] that the output head takes."""
        embedded = self._embed(tape)
        tokens = self.rows.width if self.rows.lengths is None else self.rows.tokens
        turns = self._turns(tape, tokens)
        hidden = embedded
        masks = {
            is_sliding: self._masks(tape, is_sliding=is_sliding) for is_sliding in (False, True)
        }
        for index, layer in enumerate(self.model.layers):
            hidden = self._run_layer(
                tape, index, layer, hidden, turns, masks[layer.window is not None]
            )
        del masks
        return norm(tape, hidden, self.rows.tokens, self.model.family.norm)

    def _embed(self, tape: Tape) -> Value:
        elements = self.rows.tokens * self.model.hidden
        matrix = self.model.vocabulary * self.model.hidden
        if not self.adapter.embeddings:
            found = tape.constant(elements, self.itemsize)
        else:

            def backward(_: Arrived) -> Gradients:
                tape.memory(matrix * FLOAT32)
                return []

            memory = tape.memory(elements * FLOAT32)
            exact = tape.record(memory, elements, FLOAT32, [], backward, trains=True)
            found = cast(tape, exact, self.itemsize)
        return scale(tape, found) if self.model.family.scaled_embeddings else found

    def _turns(self, tape: Tape, tokens: int) -> tuple[Memory, Memory]:
        """Cosine and sine of every position."""
        size = FLOAT32 if self.model.family.norm in ("late", "plain") else self.itemsize
        nbytes = tokens * self.model.rotary_dim * size
        return tape.memory(nbytes), tape.memory(nbytes)

    def _masks(self, tape: Tape, *, is_sliding: bool) -> list[Memory]:
        """The masks that layers of one kind have in common; others are made for one example and one layer."""
        rows, layers = self.rows, self.model.layers
        window = next((one.window for one in layers if (one.window is not None) == is_sliding), 0)
        if window == 0:
            return []
        lengths = {rows.width} if rows.lengths is None else set(rows.lengths)
        squares = [
            rows.count * length**2
            for length in lengths
            if rows.lengths is None or window is None or length <= window
        ]
        if self.model.family.eager:
            return [tape.memory(square * self.itemsize) for square in squares]
        if window is None or rows.lengths is not None or rows.width <= window:
            return []
        return [tape.memory(square) for square in squares]

    def _run_layer(
        self,
        tape: Tape,
        index: int,
        layer: Layer,
        hidden: Value,
        turns: tuple[Memory, Memory],
        masks: list[Memory],
    ) -> Value:
        if not self.checkpointing:
            return self._layer(tape, index, layer, hidden, turns)
        ledger, elements, itemsize = tape.ledger, hidden.elements, hidden.itemsize
        found = self._layer(Tape(ledger, recording=False), index, layer, hidden, turns)
        needs = hidden.node is not None

        def backward(grad: Arrived) -> Gradients:
            again = Tape(ledger)
            outside = Node((), (), lambda _: ()) if needs else None
            memory = again.memory(elements * itemsize) if is_away else kept[-1]
            given = Value(memory, elements, itemsize, outside)
            del memory
            last = self._layer(again, index, layer, given, turns).node
            del given
            return [None if last is None else again.run_backward(last, grad, outside)]

        # Torch keeps what the layer was given also where nothing in it needs a gradient; of that its input alone goes to
        # the host.
        is_away = tape.on_host and hidden.nbytes >= SMALLEST_ON_HOST
        kept = [*turns, *masks] if is_away else [*turns, *masks, hidden.memory]
        return tape.record(found.memory, elements, itemsize, [hidden], backward, trains=True)

    def _layer(
        self, tape: Tape, index: int, layer: Layer, hidden: Value, turns: tuple[Memory, Memory]
    ) -> Value:
        family, tokens = self.model.family, self.rows.tokens
        linears = {linear.name: linear for linear in layer.linears}

        def project(name: str, x: Value) -> Value:
            rank = self.adapter.ranks.get(f"model.layers.{index}.{name}")
            if rank is None:
                return frozen(tape, x, linears[name], self.products)
            return adapted(tape, x, linears[name], rank, self.products)

        def normed(x: Value, *, before: bool) -> Value:
            if family.norms == ("after" if before else "before"):
                return x
            return norm(tape, x, tokens, family.norm)

        residual = hidden
        hidden = normed(hidden, before=True)
        hidden = attend(
            tape, self.model, layer, self.rows, hidden, project, turns, on_gpu=self.on_gpu
        )
        hidden = normed(hidden, before=False)
        hidden = add(tape, residual, scale(tape, hidden) if family.scaled_residual else hidden)
        residual = hidden
        hidden = normed(hidden, before=True)
        hidden = self._feed_forward(tape, layer, hidden, project)
        hidden = normed(hidden, before=False)
        return add(tape, residual, scale(tape, hidden) if family.scaled_residual else hidden)

    def _feed_forward(self, tape: Tape, layer: Layer, x: Value, project: Project) -> Value:
        if layer.experts is None:
            return _gated(tape, x, project, "mlp", fused=self.model.family.fused)
        own = None
        if layer.experts.shared_width:
            own = _gated(tape, x, project, "mlp.shared_expert", fused=False)
        mixed = through_experts(tape, x, self.model.hidden, layer.experts, self.products)
        if own is None:
            return mixed
        return shared(tape, mixed, own, project("mlp.shared_expert_gate", x))


def _gated(tape: Tape, x: Value, project: Project, path: str, *, fused: bool) -> Value:
    """``down(act(gate(x)) * up(x))``."""
    if fused:
        both = project(f"{path}.gate_up_proj", x)
        gate, up = split(tape, both, [both.elements // 2, both.elements // 2])
        return project(f"{path}.down_proj", multiply(tape, up, activate(tape, gate)))
    product = multiply(
        tape, activate(tape, project(f"{path}.gate_proj", x)), project(f"{path}.up_proj", x)
    )
    return project(f"{path}.down_proj", product)
