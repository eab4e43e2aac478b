"""What a model is made of: matrices, their sizes, and what each layer does.

Paths are those of transformers' modules (``model.layers.0.self_attn.q_proj``), since adapters are chosen by them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qlora_core.estimate.families import Family

HEAD = "lm_head"
EMBEDDINGS = "model.embed_tokens"


@dataclass(frozen=True)
class Linear:
    """A linear layer: its path below the decoder layer (or the whole path of the head), and its sizes."""

    name: str
    out_features: int
    in_features: int
    bias: bool = False

    @property
    def elements(self) -> int:
        """Of the matrix."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Experts:
    """A mixture of gated networks, of which each token goes through a few; their matrices take no adapter.

    Attributes:
        count: of all.
        per_token: how many a token goes through.
        width: of each.
        shared_width: of one more that every token goes through, weighed by a gate; 0 for none.
    """

    count: int
    per_token: int
    width: int
    shared_width: int


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Attributes:
        linears: those that are called, so that an adapter can be put over each.
        experts: None for a plain feed-forward network.
        width: of the feed-forward network.
        window: keys that a token sees at most, None for all before it.
    """

    linears: tuple[Linear, ...]
    experts: Experts | None
    width: int
    window: int | None


@dataclass(frozen=True)
class Architecture:
    """A decoder-only model.

    Attributes:
        family: what it does otherwise than Llama.
        rotary_dim: how much of a head's width is turned by its position.
        alone_above: an example longer than this shares no packed row; None for no limit.
        assumed: in words, what of it is not known but taken for granted; empty where the family is known.
    """

    model_type: str
    family: Family
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    tied: bool
    layers: tuple[Layer, ...]
    alone_above: int | None
    assumed: tuple[str, ...]

    @property
    def query_width(self) -> int:
        """Of all heads' queries."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Of all heads' keys, and of their values."""
        return self.kv_heads * self.head_dim

    @property
    def head(self) -> Linear:
        """The output head."""
        return Linear(HEAD, self.vocabulary, self.hidden)

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """Give every linear layer with its whole path, in the model's order; the head last."""
        for index, layer in enumerate(self.layers):
            for linear in layer.linears:
                yield f"model.layers.{index}.{linear.name}", linear
        yield HEAD, self.head
