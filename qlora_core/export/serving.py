"""What servers other than PEFT make of an adapter: what they refuse, and what they would get wrong without a word.

Source: vLLM 0.26, ``vllm/lora/peft_helper.py`` and ``vllm/config/lora.py``; llama.cpp of 2026,
``convert_lora_to_gguf.py``.
"""

from __future__ import annotations

from qlora_core.nn import LoraConfig

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_DEFAULT_RANK = 16


def serving_warnings(config: LoraConfig) -> list[str]:
    """Say, a sentence each, which servers cannot use such an adapter as it is, and what to do about it.

    Args:
        config: of the adapter as it is written; `save_adapter` with ``fold_rslora`` writes one without rsLoRA.

    Returns:
        Nothing for an adapter that vLLM takes with its default settings and llama.cpp converts rightly.
    """
    return [*_vllm(config), *_llama_cpp(config)]


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
