"""The estimated time rests on the operations that the trainer counts, and its range on the figures of a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_core import add_lora, estimate
from qlora_core.estimate.adapter import choose_adapter
from qlora_core.estimate.describing import describe
from qlora_core.estimate.settings import read_settings
from qlora_core.estimate.step_time import training_flops
from qlora_core.nn import LoraConfig
from qlora_core.train.flops import count_shapes
from qlora_core.train.flops import training_flops as counted_flops
from tests.qlora_core.estimate.families import FAMILIES, config_of


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "lora",
    [{"r": 3}, {"r": 2, "modules_to_save": ("embed_tokens", "lm_head")}],
    ids=["lora", "whole"],
)
def test_operations_are_those_that_the_trainer_counts(family: str, lora: dict[str, Any]) -> None:
    config = config_of(family)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    add_lora(model, LoraConfig(**lora))
    described = describe(config.to_dict(), "config")

    found = training_flops(
        described,
        choose_adapter(described, read_settings({"lora": lora}).lora),
        tokens=4 * 700,
        mean_tokens=700,
        trained=123,
    )

    assert found == pytest.approx(counted_flops(count_shapes(model), [700] * 4, 123), rel=1e-9)


def test_the_range_holds_the_expected_time_and_the_floor_lies_below() -> None:
    time = estimate(config_of("llama").to_dict()).step_time

    assert 0 < time.floor_s < time.low_s < time.expected_s < time.high_s


def test_a_faster_card_and_kept_activations_take_less_time() -> None:
    config = config_of("llama").to_dict()

    slow = estimate(config, card="NVIDIA L4").step_time
    fast = estimate(config, card="NVIDIA H100 80GB HBM3").step_time
    kept = estimate(config, {"gradient_checkpointing": False}, card="NVIDIA L4").step_time

    assert fast.expected_s < slow.expected_s
    assert kept.expected_s < slow.expected_s


def test_the_floor_of_a_known_case_is_that_of_its_arithmetic() -> None:
    config = {
        "model_type": "llama", "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1024,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
    }  # fmt: skip
    settings = {
        "batch_size": 2, "context_length": 100, "micro_batch_tokens": 200, "gradient_checkpointing": False,
        "lora": {"r": 1, "target_modules": ["q_proj"]},
    }  # fmt: skip

    found = estimate(config, settings, card="T4")

    weights = 4 * 512**2 + 3 * 512 * 1024
    flops = 200 * (4 * weights + 6 * 2 * 512) + 200 * 4 * 512 * 1000
    flops += 6 * 2 * 512 * 2 * (100 * 101 // 2)
    codes = sum(
        n // 2 + n // 64 + 4 * (n // 64 // 256) + 4 for n in [512**2] * 4 + [512 * 1024] * 3
    )
    moved = 2 * (codes + 2 * 2 * weights)
    assert found.step_time.floor_s == pytest.approx(flops / 65e12 + moved / 320e9)


def test_what_it_rests_on_is_said() -> None:
    found = estimate(config_of("llama").to_dict(), card="NVIDIA L4")

    assert any("not measured" in one and "300 GB/s of L4" in one for one in found.assumed)
