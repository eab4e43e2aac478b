"""Small configurations of the families that the estimate knows, large enough that activations count."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

_SIZES: dict[str, Any] = {
    "vocab_size": 389,
    "hidden_size": 96,
    "intermediate_size": 248,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WIDE = {"head_dim": 32}
_GEMMA = {**_WIDE, "query_pre_attn_scalar": 32, "sliding_window": 512}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 80}
_PARTICULARS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": _WIDE,
    "gemma": _WIDE,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": {},
    "mixtral": {"num_local_experts": 4},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 512},
    "granite": {},
    "smollm3": {},
    "seed_oss": {**_WIDE, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 96},
    "qwen3_moe": {**_EXPERTS, **_WIDE},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}
FAMILIES = tuple(_PARTICULARS)


def config_of(family: str, **changes: Any) -> PreTrainedConfig:
    """Give a small configuration of the family."""
    return CONFIG_MAPPING[family](**{**_SIZES, **_PARTICULARS[family], **changes})
