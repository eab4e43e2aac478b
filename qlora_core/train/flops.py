"""Floating-point operations of a training step, counted from the model's shapes: what MFU is a share of.

Counted is what the mathematics needs, however it is computed: recomputed activations and dequantized
weights are no progress, so they are not in it. Per token, with a multiplication and an addition as two:

    frozen weight, per element     4     forward 2, gradient of its input 2
    trained weight, per element    6     and its own gradient 2
    output head                    the same, for trained tokens only: no other is sent through it
    attention, per key seen        6 * (width of all heads' keys + of all heads' values), causal

Of a mixture of experts the experts that a token is sent to count. Embeddings are looked up and count
nothing. Source: PaLM, arXiv:2204.02311, appendix B, whose 6 per parameter assumes that all are trained
and whose attention is not causal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qlora_core.nn import NF4Linear
from qlora_core.nn.nf4_experts import NF4Stack


@dataclass(frozen=True)
class Attention:
    """Layers of one kind.

    Attributes:
        n_layers: how many.
        width: of all heads' keys and of all heads' values, added up.
        window: keys that a token sees at most, None for all before it.
    """

    n_layers: int
    width: int
    window: int | None


@dataclass(frozen=True)
class ModelShapes:
    """What a model multiplies by, in elements that one token meets.

    Attributes:
        frozen, trained: outside of the output head.
        head_frozen, head_trained: of the output head.
        attention: by kind of layer.
    """

    frozen: float
    trained: float
    head_frozen: float
    head_trained: float
    attention: tuple[Attention, ...]


def training_flops(shapes: ModelShapes, lengths: Sequence[int], n_trained_tokens: int) -> float:
    """Return the operations of a forward and backward pass over whole examples.

    Args:
        shapes: of the model.
        lengths: of the examples, in tokens; padding counts nothing.
        n_trained_tokens: of all of them together.
    """
    flops = sum(lengths) * (4 * shapes.frozen + 6 * shapes.trained)
    flops += n_trained_tokens * (4 * shapes.head_frozen + 6 * shapes.head_trained)
    for kind in shapes.attention:
        keys = sum(_keys_seen(length, kind.window) for length in lengths)
        flops += 6 * kind.n_layers * kind.width * keys
    return flops


def count_shapes(model: PreTrainedModel) -> ModelShapes:
    """Return the shapes of a model, with adapters or without."""
    config = model.config.get_text_config()
    head: Any = model.get_output_embeddings()
    in_head = set() if head is None else {id(module) for module in head.modules()}
    counts = {"frozen": 0.0, "trained": 0.0, "head_frozen": 0.0, "head_trained": 0.0}
    for module, n_elements, trained in _weights(model, _active_experts(config)):
        place = "head_" if id(module) in in_head else ""
        counts[place + ("trained" if trained else "frozen")] += n_elements
    return ModelShapes(**counts, attention=tuple(_attention(config)))


def _keys_seen(length: int, window: int | None) -> int:
    """Add up over an example's tokens how many keys each one sees, itself included."""
    if window is None or length <= window:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def _weights(model: nn.Module, active_experts: int) -> Iterator[tuple[nn.Module, float, bool]]:
    """Give each weight matrix's module, the elements of it that a token meets, and whether it is trained."""
    replaced = {
        id(inside)
        for module in model.modules()
        if (original := getattr(module, "original", None)) is not None
        for inside in original.modules()
    }
    for path, module in model.named_modules():
        if id(module) in replaced or _is_embedding(module):
            continue
        if isinstance(module, NF4Linear):
            yield module, module.in_features * module.out_features, False
        if isinstance(module, NF4Stack):
            yield module, active_experts * module.in_features * module.out_features, False
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2:
                continue
            n_elements = parameter.numel()
            if parameter.dim() == 3 and "experts" in f"{path}.{name}":
                n_elements = n_elements / parameter.shape[0] * active_experts
            yield module, n_elements, parameter.requires_grad


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(getattr(module, "original", module), nn.Embedding)


def _active_experts(config: Any) -> int:  # noqa: ANN401 - any family's config
    return int(getattr(config, "num_experts_per_tok", None) or 1)


def _attention(config: Any) -> Iterator[Attention]:  # noqa: ANN401
    n_layers, n_heads = config.num_hidden_layers, getattr(config, "num_attention_heads", None)
    if not n_heads:  # a model of state spaces alone
        return
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    # Multi-head latent attention has keys of another width than its values.
    value_dim = getattr(config, "v_head_dim", None) or head_dim
    key_dim = head_dim
    if getattr(config, "qk_nope_head_dim", None):
        key_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", None) is False:
        window = None
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        kinds = ["sliding_attention" if window else "full_attention"] * n_layers
    for kind in ("full_attention", "sliding_attention"):
        if kind in kinds:
            width = n_heads * (key_dim + value_dim)
            yield Attention(kinds.count(kind), width, window if kind != "full_attention" else None)
