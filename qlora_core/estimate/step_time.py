"""A range for the time of an optimizer step: from a device's own limits, with assumed shares of them. Never measured.

The floor is what the products and the bytes that have to move would take at the device's full rates. A real step takes a
multiple of it; which one is assumed (`_SHARES`) until it has been measured, and is said with the estimate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from qlora_core.estimate.adapter import Adapter
from qlora_core.estimate.architecture import HEAD, Architecture
from qlora_core.estimate.devices import Figures
from qlora_core.estimate.parameters import Storage, matrices, nf4_bytes

# Of the device's rates: as good as training gets, a usual share, and a poor one (short rows, small matrices).
_SHARES = {"low_s": 0.6, "expected_s": 0.35, "high_s": 0.12}


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step; an estimate.

    Attributes:
        floor_s: at the device's full rates.
        low_s, expected_s, high_s: at a good, usual and poor share of them.
    """

    floor_s: float
    low_s: float
    expected_s: float
    high_s: float

    def as_dict(self) -> dict[str, float]:
        """Return it as JSON-able values."""
        return asdict(self)


def assumptions(figures: Figures) -> str:
    """Say what the time rests on."""
    shares = ", ".join(f"{share:.0%}" for share in _SHARES.values())
    return (
        f"step time is calculated, not measured: {figures.tflops:g} TFLOP/s and {figures.gb_per_s:g} GB/s of "
        f"{figures.name}, of which {shares} are taken to be reached"
    )


def training_flops(
    model: Architecture, adapter: Adapter, *, tokens: float, mean_tokens: float, trained: float
) -> float:
    """Return what the mathematics of a step needs, as `qlora_core.train.flops.training_flops` counts it.

    Args:
        model: what is trained.
        adapter: over it.
        tokens: of the step.
        mean_tokens: of an example.
        trained: tokens that carry loss.
    """
    per_token = sum(
        4 * frozen + 6 * trained_elements for frozen, trained_elements in _weights(model, adapter)
    )
    head = model.head.elements
    rank = adapter.ranks.get(HEAD, 0)
    per_trained = (
        6 * head if adapter.head else 4 * head + 6 * rank * (model.hidden + model.vocabulary)
    )
    flops = tokens * per_token + trained * per_trained
    for layer in model.layers:
        keys = _keys_seen(mean_tokens, layer.window) / mean_tokens
        flops += 6 * 2 * model.query_width * keys * tokens
    return flops


def estimate_time(
    model: Architecture,
    adapter: Adapter,
    storage: Storage,
    figures: Figures,
    *,
    tokens: float,
    mean_tokens: float,
    trained: float,
    passes: int,
    checkpointing: bool,
    product_bytes: int,
) -> StepTime:
    """Return the range for a step.

    Args:
        model: what is trained.
        adapter: over it.
        storage: of its base.
        figures: of the device.
        tokens: of the step.
        mean_tokens: of an example.
        trained: tokens of the step that carry loss.
        passes: forward and backward passes of the step.
        checkpointing: whether each layer's forward pass is done twice.
        product_bytes: of a number that matrices are multiplied in.
    """
    flops = training_flops(model, adapter, tokens=tokens, mean_tokens=mean_tokens, trained=trained)
    if checkpointing:
        # A forward pass is half of what frozen weights take.
        flops *= 1.5
    times = 3 if checkpointing else 2
    moved = passes * times * _dequantizing_bytes(model, storage, product_bytes)
    floor_s = flops / (figures.tflops * 1e12) + moved / (figures.gb_per_s * 1e9)
    return StepTime(floor_s=floor_s, **{name: floor_s / share for name, share in _SHARES.items()})


def _weights(model: Architecture, adapter: Adapter) -> Iterator[tuple[float, float]]:
    """Give frozen and trained elements that a token meets, for each matrix but the head's."""
    for path, linear in model.linears():
        if path != HEAD:
            rank = adapter.ranks.get(path, 0)
            yield linear.elements, rank * (linear.in_features + linear.out_features)
    for layer in model.layers:
        if layer.experts is not None:
            experts = layer.experts
            yield 3 * experts.per_token * experts.width * model.hidden, 0
            yield experts.count * model.hidden, 0


def _dequantizing_bytes(model: Architecture, storage: Storage, product_bytes: int) -> int:
    """Bytes of reading every quantized weight, writing it dense, and reading it for the product."""
    return sum(
        times * (nf4_bytes(linear.elements, storage) + 2 * product_bytes * linear.elements)
        for layer in model.layers
        for times, linear in matrices(model, layer)
    )


def _keys_seen(length: float, window: int | None) -> float:
    """Add up over an example's tokens how many keys each one sees, itself included."""
    if window is None or length <= window:
        return length * (length + 1) / 2
    return window * (window + 1) / 2 + (length - window) * window
