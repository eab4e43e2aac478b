"""Tiny random models of many families, in float32: what must hold for any causal language model is tried on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

VOCABULARY = 97
HIDDEN = 32
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GEMMA = {**SIZES, "head_dim": 8, "query_pre_attn_scalar": 8}
_JAMBA = {
    **SIZES, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
    "mamba_d_state": 8, "use_mamba_kernels": False,
}  # fmt: skip
_LLAMA4 = {
    **SIZES, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 6,
}  # fmt: skip

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "mistral with a window": lambda: MistralConfig(**SIZES, sliding_window=5),
    "qwen2, tied": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "gemma2": lambda: Gemma2Config(**_GEMMA, sliding_window=6),
    # A cap this low bends even a random model's small logits.
    "gemma2 with a low cap": lambda: Gemma2Config(
        **_GEMMA, sliding_window=6, final_logit_softcapping=0.5
    ),
    "gemma3": lambda: Gemma3TextConfig(**_GEMMA, sliding_window=6),
    "gemma3 with eyes": lambda: Gemma3Config(
        text_config=Gemma3TextConfig(**_GEMMA, sliding_window=6).to_dict(),
        vision_config=SiglipVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            image_size=28, patch_size=14,
        ).to_dict(),
        mm_tokens_per_image=1, image_token_index=96, boi_token_index=95, eoi_token_index=94,
    ),
    "phi3": lambda: Phi3Config(**SIZES),
    "phi": lambda: PhiConfig(**SIZES),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    "granite": lambda: GraniteConfig(**SIZES, logits_scaling=3.0),
    "cohere": lambda: CohereConfig(**SIZES, logit_scale=0.25),
    "cohere2": lambda: Cohere2Config(**SIZES, logit_scale=0.25, sliding_window=5),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64,
        embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0,
    ),
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16, dropout=0.0),
    "falcon": lambda: FalconConfig(**SIZES, alibi=False),
    "falcon with alibi": lambda: FalconConfig(**SIZES, alibi=True, new_decoder_architecture=False),
    "bloom": lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=2, n_head=4),
    "llama4": lambda: Llama4TextConfig(**_LLAMA4),
    "mamba": lambda: MambaConfig(**SIZES, state_size=8, use_mambapy=False),
    "jamba": lambda: JambaConfig(**_JAMBA),
}  # fmt: skip


def build(family: str, **changes: Any) -> Any:
    """Return a model whose weights are large enough that layers and positions matter, in eval mode."""
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if isinstance(config, Gemma3Config):
            model: PreTrainedModel = Gemma3ForConditionalGeneration(config)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=0.2)
            elif "bias" in name or "norm" in name:
                torch.nn.init.normal_(parameter, mean=0.0 if "bias" in name else 1.0, std=0.1)
    return model.eval()
