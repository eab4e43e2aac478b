"""Small random models and tokenizers on disk, for every test that needs a base model.

The weights are random but seeded, so a folder is the same whenever it is built. Tokenizer: byte-level
BPE trained on a few lines, with a ChatML template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BOS, EOS, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
VOCAB_SIZE = 384
_CORPUS = (
    "A nibble is four bits, half a byte.",
    "Return the number of items in a container.",
    "What does the function len do? It returns the length of an object.",
    "user assistant system: you are a helpful assistant.",
)


def save_tiny_llama(
    folder: Path, *, seed: int = 0, shard_bytes: int | None = None, **config: Any
) -> Path:
    """Save a random Llama (untied head, grouped queries) of some 60,000 parameters; give ``folder``."""
    from transformers import LlamaConfig

    settings = {"num_key_value_heads": 2, "tie_word_embeddings": False, **config}
    return _save(LlamaConfig(**_sizes() | settings), folder, seed, shard_bytes)


def save_tiny_qwen2(
    folder: Path, *, seed: int = 0, shard_bytes: int | None = None, **config: Any
) -> Path:
    """Save a random Qwen2 (biases on q, k and v, tied head); give ``folder``."""
    from transformers import Qwen2Config

    settings = {"num_key_value_heads": 2, "tie_word_embeddings": True, **config}
    return _save(Qwen2Config(**_sizes() | settings), folder, seed, shard_bytes)


def save_tiny_gemma2(
    folder: Path, *, seed: int = 0, shard_bytes: int | None = None, **config: Any
) -> Path:
    """Save a random Gemma 2 (tied head, scaled embeddings, soft-capped logits); give ``folder``."""
    from transformers import Gemma2Config

    settings = {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
        **config,
    }
    return _save(Gemma2Config(**_sizes() | settings), folder, seed, shard_bytes)


def save_tiny_tokenizer(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Save tokenizer.json and tokenizer_config.json (with the chat template); give ``folder``.

    Every byte has a token, so any text can be encoded; ids stay below `VOCAB_SIZE`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": 128,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def _sizes() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _save(config: Any, folder: Path, seed: int, shard_bytes: int | None) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # transformers starts biases and norms as constants; random ones show a lost tensor.
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    sharding = {} if shard_bytes is None else {"max_shard_size": shard_bytes}
    model.save_pretrained(folder, **sharding)
    return save_tiny_tokenizer(folder)
