"""How many parameters a model has, by how they are stored, and the bytes of that."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from qlora_core.estimate.adapter import Adapter
from qlora_core.estimate.architecture import Architecture, Layer, Linear

_SCALES_PER_NESTED = 256


@dataclass(frozen=True)
class Storage:
    """How the base model is kept.

    Attributes:
        dense_bytes: of an element that is not quantized.
        block_size: elements per scale.
        double_quant: whether the scales are 8-bit codes.
        head_in_nf4: whether the output head is quantized, too.
    """

    dense_bytes: int
    block_size: int = 64
    double_quant: bool = True
    head_in_nf4: bool = False


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by how they are stored; what two layers share counts once.

    Attributes:
        nf4: in four bits.
        embeddings: of the embeddings, and of the output head if it is dense and has a matrix of its own.
        other: norms, biases, routers.
        adapter: trained.
    """

    nf4: int
    embeddings: int
    other: int
    adapter: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.nf4 + self.embeddings + self.other + self.adapter

    def as_dict(self) -> dict[str, int]:
        """Return it as JSON-able values."""
        return {**asdict(self), "total": self.total}


def nf4_bytes(elements: int, storage: Storage) -> int:
    """Return the bytes of a quantized matrix: codes, scales and, doubly quantized, what scales them."""
    blocks = -(-elements // storage.block_size)
    codes = (elements + 1) // 2
    if not storage.double_quant:
        return codes + 4 * blocks
    return codes + blocks + 4 * -(-blocks // _SCALES_PER_NESTED) + 4


def matrices(model: Architecture, layer: Layer) -> list[tuple[int, Linear]]:
    """Give a layer's quantized matrices, each with how often it is there; a stack of experts is one, many times."""
    found = [(1, linear) for linear in layer.linears]
    if layer.experts is not None:
        count, width = layer.experts.count, layer.experts.width
        found.append((count, Linear("mlp.experts.gate_up_proj", 2 * width, model.hidden)))
        found.append((count, Linear("mlp.experts.down_proj", model.hidden, width)))
    return found


def largest_matrix(model: Architecture, storage: Storage) -> int:
    """Return the elements of the largest quantized matrix, which a product needs dense."""
    own = [one.elements for layer in model.layers for _, one in matrices(model, layer)]
    return max([*own, model.head.elements if _has_nf4_head(model, storage) else 0])


def count_parameters(model: Architecture, adapter: Adapter, storage: Storage) -> ParameterCounts:
    """Count a model's parameters and its adapter's."""
    quantized = [pair for layer in model.layers for pair in matrices(model, layer)]
    nf4 = sum(times * linear.elements for times, linear in quantized)
    embeddings = model.vocabulary * model.hidden
    if _has_nf4_head(model, storage):
        nf4 += model.head.elements
    elif not model.tied:
        embeddings += model.head.elements
    biases = sum(linear.out_features for _, linear in quantized if linear.bias)
    return ParameterCounts(
        nf4, embeddings, biases + _norms(model) + _routers(model), adapter.elements
    )


def base_bytes(model: Architecture, counts: ParameterCounts, storage: Storage) -> int:
    """Return the bytes of everything frozen, the rotary embedding's buffers with it."""
    quantized = sum(
        times * nf4_bytes(linear.elements, storage)
        for layer in model.layers
        for times, linear in matrices(model, layer)
    )
    if _has_nf4_head(model, storage):
        quantized += nf4_bytes(model.head.elements, storage)
    # Frequencies in float32, kept twice: as they are, and as they were before any scaling.
    frequencies = 2 * 4 * (model.rotary_dim // 2)
    return quantized + storage.dense_bytes * (counts.embeddings + counts.other) + frequencies


def _has_nf4_head(model: Architecture, storage: Storage) -> bool:
    return storage.head_in_nf4 and not model.tied


def _norms(model: Architecture) -> int:
    if model.family.norm == "plain":
        return 0
    per_layer = model.hidden * (4 if model.family.norms == "around" else 2)
    if model.family.qk_norm == "head":
        per_layer += 2 * model.head_dim
    if model.family.qk_norm == "whole":
        per_layer += model.query_width + model.kv_width
    return per_layer * len(model.layers) + model.hidden


def _routers(model: Architecture) -> int:
    return sum(
        layer.experts.count * model.hidden for layer in model.layers if layer.experts is not None
    )
