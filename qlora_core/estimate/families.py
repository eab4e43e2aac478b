"""How families of the one common decoder differ, as data.

The common decoder is Llama's: embeddings, layers of attention and a gated feed-forward network with a norm before each,
a norm and an output head. A family that is not here is taken for it, and the estimate says so.

Source: transformers 5.23, ``models/<family>/modeling_<family>.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Switch = bool | str
"""Whether something is there: known of the family, or a field of config.json that says it."""


@dataclass(frozen=True)
class Family:
    """What one family does otherwise than Llama.

    Attributes:
        qkv_bias, o_bias, mlp_bias: which linear layers have a bias.
        fused: query, key and value are one layer, and so are gate and up.
        qk_norm: queries and keys are normed, by head or over all heads together.
        norms: whether a layer's two parts are normed before, after, or both.
        norm: how: in Llama's way; "gemma" multiplies by ``1 + weight`` in float32, "late" by the weight in float32, and
            "plain" is a layer norm without a weight.
        scaled_residual: what a part adds to the residual is multiplied by a number first (also the embeddings).
        scaled_embeddings: the embeddings are multiplied by a number.
        scaled_logits: so are the logits.
        eager: attention makes all scores and bends them, which none of the fused kernels does.
        capped_logits: so are the logits bent.
        tied: whether the head is the embedding's matrix where config.json does not say.
        experts: field with the number of experts; None for a family without.
        expert_width: field with the width of one expert.
        shared_expert: there is one more expert, for every token, of the width in this field.
        full_every: where no ``layer_types`` say which layers attend within the window of config.json: so many, of which
            the last attends to everything; 0 if all keep to the window, None if none does.
    """

    qkv_bias: Switch = False
    o_bias: Switch = False
    mlp_bias: Switch = False
    fused: bool = False
    qk_norm: Literal["none", "head", "whole"] = "none"
    norms: Literal["before", "after", "around"] = "before"
    norm: Literal["llama", "gemma", "late", "plain"] = "llama"
    scaled_residual: bool = False
    scaled_embeddings: bool = False
    scaled_logits: bool = False
    eager: bool = False
    capped_logits: bool = False
    tied: bool = False
    experts: str | None = None
    expert_width: str = "moe_intermediate_size"
    shared_expert: str | None = None
    full_every: int | None = None


_BIASED = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
LLAMA = Family(**_BIASED, mlp_bias="mlp_bias")

FAMILIES = {
    "llama": LLAMA,
    "seed_oss": Family(qkv_bias="attention_bias", o_bias="attention_out_bias", mlp_bias="mlp_bias"),
    "smollm3": Family(**_BIASED, mlp_bias="mlp_bias", tied=True),
    "mistral": Family(full_every=0),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(**_BIASED, qk_norm="head"),
    "gemma": Family(**_BIASED, norm="gemma", scaled_embeddings=True, tied=True),
    "gemma2": Family(
        **_BIASED, norms="around", norm="gemma", scaled_embeddings=True, eager=True, capped_logits=True, full_every=2,
        tied=True,
    ),
    "gemma3_text": Family(
        **_BIASED, norms="around", norm="gemma", qk_norm="head", scaled_embeddings=True, full_every=6, tied=True
    ),
    "phi3": Family(fused=True, full_every=0),
    "olmo": Family(**_BIASED, norm="plain"),
    "olmo2": Family(**_BIASED, norms="after", norm="late", qk_norm="whole"),
    "olmo3": Family(**_BIASED, norms="after", norm="late", qk_norm="whole", full_every=4),
    "granite": Family(
        **_BIASED, mlp_bias="mlp_bias", scaled_residual=True, scaled_embeddings=True, scaled_logits=True
    ),
    "mixtral": Family(experts="num_local_experts", expert_width="intermediate_size", full_every=0),
    "qwen2_moe": Family(
        qkv_bias="qkv_bias", experts="num_experts", shared_expert="shared_expert_intermediate_size"
    ),
    "qwen3_moe": Family(**_BIASED, qk_norm="head", experts="num_experts"),
    "olmoe": Family(
        **_BIASED, qk_norm="whole", experts="num_experts", expert_width="intermediate_size"
    ),
}  # fmt: skip
