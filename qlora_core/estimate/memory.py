"""Peak memory of a training step by kind: the names and meanings of `qlora_core.train.memory.meter.MemoryMeter`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from qlora_core.estimate.adapter import Adapter
from qlora_core.estimate.architecture import Architecture
from qlora_core.estimate.decoder import Decoder
from qlora_core.estimate.head import forward_and_backward
from qlora_core.estimate.operations import FLOAT32
from qlora_core.estimate.optimizers import Optimizer, buffer_elements
from qlora_core.estimate.parameters import (
    ParameterCounts,
    Storage,
    base_bytes,
    largest_matrix,
)
from qlora_core.estimate.products import Products
from qlora_core.estimate.rows import Rows
from qlora_core.estimate.tape import Ledger, Tape


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of tensors at the peak of a step.

    Attributes:
        base_bytes: everything frozen.
        adapter_bytes: everything trained, and its copy in the dtype of products where there is one.
        optimizer_bytes: its moments, wherever they are.
        optimizer_resident_bytes: of them, what is on the device at the peak and counts in the whole; where the rest is
            not there, it is in the host's memory.
        gradients_bytes: of what is trained.
        activations_bytes: what is left of the peak.
        workspace_bytes: the largest quantized weight while it is dense.
    """

    base_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    optimizer_resident_bytes: int
    gradients_bytes: int
    activations_bytes: int
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        """The peak on the device."""
        return sum(asdict(self).values()) - self.optimizer_bytes

    def as_dict(self) -> dict[str, int]:
        """Return it as JSON-able values."""
        return {**asdict(self), "total_bytes": self.total_bytes}


def estimate_memory(
    model: Architecture,
    adapter: Adapter,
    counts: ParameterCounts,
    storage: Storage,
    rows: Rows,
    optimizer: Optimizer,
    *,
    checkpointing: bool,
    dropout: bool,
    product_bytes: int,
    on_gpu: bool,
    inputs_on_host: bool,
) -> MemoryEstimate:
    """Go through the pass of a step that takes most, and add what is there beside it.

    Args:
        model: what is trained.
        adapter: over it.
        counts: of its parameters.
        storage: of its base; what is not quantized is as large as hidden states are.
        rows: of the largest pass.
        optimizer: over the adapter.
        checkpointing: whether layers are computed again on the way back.
        dropout: whether the adapters drop some of their inputs.
        product_bytes: of a number that matrices are multiplied in.
        on_gpu: whether the dense weight of a product is new memory each time.
        inputs_on_host: whether what is kept for the backward pass is in the host's memory until then.
    """
    ledger = Ledger()
    # On a CPU products are in float32; of what is trained whole a copy would have no use.
    copied = on_gpu and product_bytes < FLOAT32 and not (adapter.embeddings or adapter.head)
    products = Products(product_bytes, makes_dense=on_gpu, dropout=dropout, has_copies=copied)
    decoder = Decoder(model, adapter, products, rows, storage.dense_bytes, checkpointing, on_gpu)
    forward_and_backward(decoder, Tape(ledger, on_host=inputs_on_host))
    workspace = product_bytes * largest_matrix(model, storage)
    # A CPU keeps the workspace whether a product runs or not.
    activations = max(0, ledger.peak_bytes - (workspace if on_gpu else 0))
    elements = buffer_elements(adapter.tensors)
    trained = FLOAT32 * elements
    moments = resident = optimizer.state_bytes(adapter.tensors)
    if optimizer.paged and on_gpu:
        # They come back for the optimizer's step, when activations are gone.
        resident = max(0, moments - activations - workspace)
    return MemoryEstimate(
        base_bytes=base_bytes(model, counts, storage),
        adapter_bytes=trained + (product_bytes * elements if copied else 0),
        optimizer_bytes=moments,
        optimizer_resident_bytes=resident,
        gradients_bytes=trained,
        activations_bytes=activations,
        workspace_bytes=workspace,
    )
