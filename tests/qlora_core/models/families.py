"""A tiny random model of every family that transformers has a causal language model for.

Most configurations are made by shrinking the sizes they have in common; what a family needs besides stands in a table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

_SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "hidden_dim"), 64
    ),
    **dict.fromkeys(("embedding_size", "d_embed", "word_embed_proj_dim", "output_size"), 64),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 128
    ),
    **dict.fromkeys(("ffn_hidden_size", "d_inner", "dim_ff", "d_ff", "dff", "mlp_dim"), 128),
    **dict.fromkeys(
        ("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 64
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "num_layers",
            "n_layer",
            "n_layers",
            "encoder_layers",
            "decoder_layers",
            "num_decoder_layers",
        ),
        2,
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels"), 16),
    **dict.fromkeys(("vocab_size", "pad_vocab_size"), 128),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 64
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 64),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 16),
    "hidden_size_global": 64,
    "qk_head_dim": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_QWEN4_EXP = {
    "ngram_vocab_size_base": 50,
    "ple_embed_dim": 64,
    "ple_layer_ids": [1],
    "split_ngram_parts": 2,
    "hc_lowrank": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_DOTS3_NOTE = {
    "index_head_dim": 32,
    "index_n_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
    "swa_head_dim": 32,
}
_ADJUSTMENTS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"n_group": 1, "topk_group": 1, "layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "text_config": _DOTS3_NOTE,
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": _DOTS3_NOTE,
    "gemma3": {
        "text_config": {"intermediate_size": 256},
        "vision_config": {"vision_use_head": False, "hidden_size": 32},
    },
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 128},
    "gemma4": {"text_config": {"vocab_size_per_layer_input": 128, "global_head_dim": 16}},
    "gemma4_text": {"vocab_size_per_layer_input": 128, "global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "num_hidden_layers": 2,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "moshi": {"audio_vocab_size": 64},
    "phi4_multimodal": {
        "vision_config": {"hidden_size": 32, "intermediate_size": 64},
        "audio_config": {"num_blocks": 2, "nemo_conv_channels": 32, "ext_pw_out_channel": 64},
    },
    "qwen4_exp": {"text_config": _QWEN4_EXP},
    "qwen4_exp_text": _QWEN4_EXP,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [16, 48],
        "axial_pos_shape": [8, 8],
        "attn_layers": ["local", "lsh"],
    },
    "roc_bert": {
        "shape_vocab_size": 50,
        "shape_embed_dim": 64,
        "pronunciation_vocab_size": 50,
        "pronunciation_embed_dim": 64,
    },
    "xlnet": {"n_head": 2},
    "xlstm": {"mode": "train", "chunk_size": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(family: str) -> PreTrainedConfig:
    """Give a small configuration of the family."""
    return _shrink(CONFIG_MAPPING[family](), _ADJUSTMENTS.get(family, {}))


def _shrink(config: PreTrainedConfig, adjustments: dict[str, Any]) -> PreTrainedConfig:
    known = config.to_dict()
    settings: dict[str, Any] = {name: size for name, size in _SIZES.items() if name in known}
    if "kv_lora_rank" in known:  # latent attention has no groups
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    settings |= _one_layer_of_each_type(known)
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            settings[name] = _shrink(value, adjustments.get(name, {})).to_dict()
    settings |= {
        name: value
        for name, value in adjustments.items()
        if not isinstance(settings.get(name), dict)
    }
    return type(config)(**settings)


def _one_layer_of_each_type(known: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        types = known.get(name)
        if isinstance(types, list) and types:
            settings[name] = list(dict.fromkeys(types))
    longest = max((len(types) for types in settings.values()), default=0)
    for name, types in settings.items():
        settings[name] = (
            (types * longest)[:longest]
            if len(types) == 1
            else types + types[-1:] * (longest - len(types))
        )
    if longest:
        settings["num_hidden_layers"] = longest
    return settings


def save_tiny(family: str, folder: Path) -> None:
    """Save a random model of the family."""
    config = tiny_config(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    model.save_pretrained(folder)
    if model.config.model_type not in FAMILIES:
        # The model's own configuration is a part of the family's, which alone says what to load.
        config.save_pretrained(folder)
