"""How many tokens a step and its largest pass have."""

from __future__ import annotations

from typing import Any

from qlora_core import estimate

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip


def test_tokens_of_a_step_are_those_of_its_examples() -> None:
    settings = {"batch_size": 8, "context_length": 512, "micro_batch_tokens": 1024}

    unknown = estimate(LLAMA, settings)
    known = estimate(LLAMA, settings, longest_tokens=400, mean_tokens=100.5)
    padded = estimate(LLAMA, {**settings, "packing": False}, longest_tokens=400, mean_tokens=100.5)

    assert (unknown.tokens_per_step, unknown.passes_per_step) == (8 * 512, 4)
    assert unknown.largest_pass_tokens == 1024
    assert (known.tokens_per_step, known.passes_per_step) == (804, 1)
    assert known.largest_pass_tokens == 1024
    assert (padded.largest_pass_tokens, padded.passes_per_step) == (800, 4)
    assert known.memory.total_bytes <= unknown.memory.total_bytes


def test_an_example_too_long_for_a_row_gets_one_of_its_own() -> None:
    found = estimate(LLAMA, {"batch_size": 2, "context_length": 2048, "micro_batch_tokens": 100})

    assert (found.largest_pass_tokens, found.passes_per_step) == (2048, 2)
