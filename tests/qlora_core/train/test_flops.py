"""Operations per step: against torch's own counter, and against figures worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
)

from qlora_core import load_model
from qlora_core.nn import LoraConfig, add_lora
from qlora_core.train.device_peaks import peak_flops_per_s
from qlora_core.train.flops import Attention, ModelShapes, count_shapes, training_flops
from tests.tiny_models import save_tiny_gemma2, save_tiny_llama, save_tiny_qwen2

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("save", [save_tiny_llama, save_tiny_qwen2, save_tiny_gemma2])
@pytest.mark.parametrize("quantize", [True, False])
def test_they_are_what_torch_counts_in_a_pass(save: Any, quantize: bool, tmp_path: Path) -> None:
    model = load_model(save(tmp_path), device="cpu", compute_dtype=torch.float32, quantize=quantize)
    # Its products are plain ones, which torch can count; so are those with the first layer's input.
    model.set_attn_implementation("eager")
    add_lora(model, LoraConfig(r=4))
    model.enable_input_require_grads()
    rows, length = 3, 13
    ids = torch.arange(rows * length).view(rows, length)

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm}) as counter:
        model(input_ids=ids).logits.sum().backward()  # pyright: ignore[reportCallIssue]

    # Plain attention multiplies every query with every key, half of which are masked.
    shapes = count_shapes(model)
    assert all(kind.window is None or kind.window > length for kind in shapes.attention)
    widths = sum(kind.n_layers * kind.width for kind in shapes.attention)
    masked = 6 * widths * rows * (length**2 - length * (length + 1) // 2)
    flops = training_flops(shapes, [length] * rows, rows * length)
    assert flops == counter.get_total_flops() - masked


def _addmm(_: Any, left: Any, right: Any, **__: Any) -> int:
    """Count what torch forgets: the products that are added in place."""
    return 2 * left[0] * left[1] * right[1]


def test_a_large_model_by_hand() -> None:
    """Llama 3.1 8B, rank 16 on all linears, one example of 2,048 tokens, all of them trained."""
    layer = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336
    ranks = 16 * ((4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 14336) * 3)
    shapes = ModelShapes(
        frozen=32 * layer, trained=32 * ranks, head_frozen=128256 * 4096, head_trained=0,
        attention=(Attention(32, 2 * 4096, None),),
    )  # fmt: skip

    per_token = training_flops(shapes, [2048], 2048) / 2048

    # GFLOP: linears 13.96 twice, head 2.10, LoRA 0.25, attention 0.537 forward and twice that backward.
    assert 32 * ranks == 41_943_040
    assert per_token / 1e9 == pytest.approx(2 * 13.96 + 2.10 + 0.25 + 3 * 0.537, abs=0.01)


def test_only_trained_tokens_pass_the_head_and_padding_counts_nothing() -> None:
    shapes = ModelShapes(10, 3, 100, 1, (Attention(2, 8, None),))

    flops = training_flops(shapes, [1, 3], 2)

    keys_seen = 1 + (1 + 2 + 3)
    assert flops == 4 * (4 * 10 + 6 * 3) + 2 * (4 * 100 + 6 * 1) + 6 * 2 * 8 * keys_seen


def test_a_window_limits_the_keys_that_a_token_sees() -> None:
    shapes = ModelShapes(0, 0, 0, 0, (Attention(1, 1, 3),))

    assert training_flops(shapes, [5, 2], 0) == 6 * ((1 + 2 + 3 + 3 + 3) + (1 + 2))


def _shapes_of(config: Any) -> ModelShapes:
    with torch.device("meta"):
        return count_shapes(AutoModelForCausalLM.from_config(config))


def test_of_a_mixture_only_the_experts_of_a_token_count() -> None:
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)

    shapes = _shapes_of(config)

    attention = 32 * (32 + 16 + 16 + 32)
    experts = 4 * 32 + 2 * (3 * 32 * 48)
    assert shapes.trained == 3 * (attention + experts)  # without adapters everything is trained
    assert shapes.head_trained == 97 * 32


def test_quantized_experts_count_like_dense_ones(tmp_path: Path) -> None:
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    counted = [
        count_shapes(load_model(tmp_path, device="cpu", compute_dtype=torch.float32, quantize=q))
        for q in (True, False)
    ]

    quantized, dense = (shapes.frozen + shapes.trained for shapes in counted)

    assert quantized == dense


def test_attention_is_read_from_the_config_of_each_family() -> None:
    latent = DeepseekV3Config(
        **SIZES, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, n_group=2,
        topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4,
        v_head_dim=6,
    )  # fmt: skip
    mixed = Gemma3TextConfig(
        **SIZES, head_dim=16, sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip

    assert _shapes_of(latent).attention == (Attention(3, 4 * (12 + 6), None),)
    assert _shapes_of(mixed).attention == (Attention(1, 128, None), Attention(2, 128, 7))
    assert _shapes_of(MistralConfig(**SIZES, sliding_window=5)).attention == (Attention(3, 64, 5),)
    assert _shapes_of(MistralConfig(**SIZES, sliding_window=None)).attention == (
        Attention(3, 64, None),
    )


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla V100-PCIE-16GB", 112.0),
        ("Tesla T4", 65.0),
    ],
)
def test_known_cards_have_their_data_sheets_peak(name: str, tflops: float) -> None:
    assert peak_flops_per_s(name) == tflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "NVIDIA A10G",
        "NVIDIA T400",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "AMD Instinct MI300X",
    ],
)
def test_other_cards_have_none(name: str) -> None:
    assert peak_flops_per_s(name) is None


def test_a_model_without_attention_counts_none() -> None:
    config = MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)

    shapes = count_shapes(AutoModelForCausalLM.from_config(config))

    assert shapes.attention == ()
    assert shapes.frozen + shapes.trained > 0
