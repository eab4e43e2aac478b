"""Peak memory of a training step by kind: the names and meanings of `qlora_core.train.memory.MemoryMeter`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from qlora_core.estimate.adapter import Adapter
from qlora_core.estimate.architecture import Architecture
from qlora_core.estimate.decoder import Decoder
from qlora_core.estimate.head import forward_and_backward
from qlora_core.estimate.operations import FLOAT32
from qlora_core.estimate.parameters import (
    ParameterCounts,
    Storage,
    base_bytes,
    largest_matrix,
)
from qlora_core.estimate.products import Products
from qlora_core.estimate.rows import Rows
from qlora_core.estimate.tape import Ledger, Tape

_MOMENTS = 2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of tensors at the peak of a step.

    Attributes:
        base_bytes: everything frozen.
        adapter_bytes: everything trained.
        optimizer_bytes: its moments.
        gradients_bytes: of what is trained.
        activations_bytes: what is left of the peak.
        workspace_bytes: the largest quantized weight while it is dense.
    """

    base_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    gradients_bytes: int
    activations_bytes: int
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        """The peak."""
        return sum(asdict(self).values())

    def as_dict(self) -> dict[str, int]:
        """Return it as JSON-able values."""
        return {**asdict(self), "total_bytes": self.total_bytes}


def estimate_memory(
    model: Architecture,
    adapter: Adapter,
    counts: ParameterCounts,
    storage: Storage,
    rows: Rows,
    *,
    checkpointing: bool,
    dropout: bool,
    several_passes: bool,
    product_bytes: int,
    on_gpu: bool,
) -> MemoryEstimate:
    """Go through the largest pass of a step and add what is there beside it.

    Args:
        model: what is trained.
        adapter: over it.
        counts: of its parameters.
        storage: of its base; what is not quantized is as large as hidden states are.
        rows: of the largest pass.
        checkpointing: whether layers are computed again on the way back.
        dropout: whether the adapters drop some of their inputs.
        several_passes: whether the gradients of other passes of the step are there already.
        product_bytes: of a number that matrices are multiplied in.
        on_gpu: whether the dense weight of a product is new memory each time.
    """
    ledger = Ledger()
    products = Products(
        product_bytes, makes_dense=on_gpu, dropout=dropout, keeps_gradients=not several_passes
    )
    decoder = Decoder(
        model,
        adapter,
        products,
        rows,
        storage.dense_bytes,
        checkpointing=checkpointing,
        on_gpu=on_gpu,
    )
    forward_and_backward(decoder, Tape(ledger))
    base = base_bytes(model, counts, storage)
    trained = FLOAT32 * adapter.elements
    # And a number of steps for each tensor.
    moments = _MOMENTS * trained + FLOAT32 * len(adapter.tensors)
    workspace = product_bytes * largest_matrix(model, storage)
    beside = base + trained + moments
    peak = max(
        beside
        + ledger.peak_bytes
        + (trained if several_passes else 0)
        + (0 if on_gpu else workspace),
        beside + trained,
    )
    return MemoryEstimate(
        base_bytes=base,
        adapter_bytes=trained,
        optimizer_bytes=moments,
        gradients_bytes=trained,
        activations_bytes=max(0, peak - beside - trained - workspace),
        workspace_bytes=workspace,
    )
