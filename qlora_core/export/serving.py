"""What others make of an adapter: what they refuse, and what they would get wrong without a word.

Source: vLLM 0.26, ``vllm/lora/peft_helper.py`` and ``vllm/config/lora.py``; llama.cpp of 2026,
``convert_lora_to_gguf.py``; PEFT 0.21.2, ``utils/transformers_weight_conversion.py``.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import conversion_mapping

from qlora_core.nn import LoraConfig, lora_modules

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_DEFAULT_RANK = 16
# In architectures that transformers 5 loads like Qwen2-MoE, PEFT means the stacked experts by these names.
_NAMES_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj")


def serving_warnings(config: LoraConfig, model: nn.Module | None = None) -> list[str]:
    """Say, a sentence each, what cannot use such an adapter as it is, and what to do about it.

    Args:
        config: of the adapter as it is written; `save_adapter` with ``fold_rslora`` writes one without rsLoRA.
        model: with the adapter, for what depends on the architecture; None where it is not at hand.

    Returns:
        Nothing for an adapter that PEFT loads, vLLM takes with its default settings, and llama.cpp converts rightly.
    """
    return [*_vllm(config), *_llama_cpp(config), *([] if model is None else _peft(model))]


def _vllm(config: LoraConfig) -> list[str]:
    warnings: list[str] = []
    highest = max([config.r, *config.rank_pattern.values()])
    if highest > _VLLM_RANKS[-1]:
        warnings.append(
            f"vLLM serves no adapter of a rank above {_VLLM_RANKS[-1]}; this one has {highest}."
        )
    elif highest > _VLLM_DEFAULT_RANK:
        enough = min(rank for rank in _VLLM_RANKS if rank >= highest)
        warnings.append(
            f"vLLM takes rank {highest} only when started with --max-lora-rank {enough}."
        )
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if getattr(config, name)]
    if patterns:
        warnings.append(
            f"vLLM ignores {' and '.join(patterns)} and would scale these layers wrongly, without a word; merge the "
            "adapter instead."
        )
    if config.modules_to_save:
        warnings.append(
            f"vLLM refuses adapters with modules_to_save ({', '.join(config.modules_to_save)}); merge the adapter instead."
        )
    return warnings


def _llama_cpp(config: LoraConfig) -> list[str]:
    warnings: list[str] = []
    if config.use_rslora:
        warnings.append(
            "llama.cpp does not know rsLoRA and would scale the adapter wrongly, without a word; save it with its scale "
            "folded into alpha (fold_rslora)."
        )
    if config.alpha_pattern:
        warnings.append(
            "llama.cpp ignores alpha_pattern and would scale these layers wrongly, without a word; merge the adapter "
            "instead."
        )
    if config.modules_to_save:
        warnings.append(
            "llama.cpp converts no adapter with whole embeddings or an output head in it "
            f"({', '.join(config.modules_to_save)}); merge the adapter instead."
        )
    return warnings


def _peft(model: Any) -> list[str]:  # noqa: ANN401 - has a config if it is of transformers
    loaded_like = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    kind = getattr(getattr(model, "config", None), "model_type", None)
    adapted = {path.rpartition(".")[2] for path in lora_modules(model)}
    names = [name for name in _NAMES_OF_EXPERTS if name in adapted]
    if loaded_like.get(kind) != "qwen2_moe" or not names:
        return []
    return [
        f"PEFT 0.21 with transformers 5 takes {', '.join(names)} of a {kind} for its stacked experts and leaves these "
        "adapters out, nearly without a word; merge the adapter instead, or train it without them."
    ]
