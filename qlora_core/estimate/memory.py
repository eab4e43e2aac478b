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
    passes: tuple[Rows, Rows | None],
    *,
    checkpointing: bool,
    dropout: bool,
    product_bytes: int,
    on_gpu: bool,
) -> MemoryEstimate:
    """Go through the passes of a step that take most, and add what is there beside them.

    Args:
        model: what is trained.
        adapter: over it.
        counts: of its parameters.
        storage: of its base; what is not quantized is as large as hidden states are.
        passes: the largest, which comes first and leaves its gradients as it goes; and the largest of those that come
            when gradients are there, None where a step is one pass.
        checkpointing: whether layers are computed again on the way back.
        dropout: whether the adapters drop some of their inputs.
        product_bytes: of a number that matrices are multiplied in.
        on_gpu: whether the dense weight of a product is new memory each time.
    """
    trained = FLOAT32 * adapter.elements

    def peak_of(rows: Rows, *, is_first: bool) -> int:
        ledger = Ledger()
        products = Products(
            product_bytes, makes_dense=on_gpu, dropout=dropout, keeps_gradients=is_first
        )
        decoder = Decoder(
            model, adapter, products, rows, storage.dense_bytes, checkpointing, on_gpu
        )
        forward_and_backward(decoder, Tape(ledger))
        return ledger.peak_bytes + (0 if is_first else trained)

    first, later = passes
    peak = peak_of(first, is_first=True)
    if later is not None:
        peak = max(peak, peak_of(later, is_first=False))
    base = base_bytes(model, counts, storage)
    # And a number of steps for each tensor.
    moments = _MOMENTS * trained + FLOAT32 * len(adapter.tensors)
    workspace = product_bytes * largest_matrix(model, storage)
    beside = trained + workspace
    if not on_gpu:
        # A CPU keeps the buffer whether a product runs or not.
        peak += workspace
    return MemoryEstimate(
        base_bytes=base,
        adapter_bytes=trained,
        optimizer_bytes=moments,
        gradients_bytes=trained,
        activations_bytes=max(0, peak - beside),
        workspace_bytes=workspace,
    )
