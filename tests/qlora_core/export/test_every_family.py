"""Every causal language model of transformers that can be quantized takes adapters, trains them, and is merged."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_core import LoraConfig, load_adapter, merge, save_adapter
from qlora_core.nn import lora_modules
from tests.qlora_core.export.bases import load, with_adapter
from tests.qlora_core.models.families import FAMILIES, save_tiny
from tests.qlora_core.models.test_families import DIVERSE, NOT_BUILT, REFUSED

IDS = torch.randint(3, 100, (1, 8), generator=torch.Generator().manual_seed(0))
# Its layers run without autograd outside of training, and are their own backward pass in it.
NO_GRADIENTS = ("reformer",)
# What these layers give is not used for text alone, or only to choose what others look at.
UNUSED = (
    *("vision", "visual", "image_e", "audio", "multi_modal_projector"),
    *("encoder_attn", "cross_attn", "patcher", "pooler", "indexer"),
)

every_family = pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in DIVERSE else pytest.mark.slow)
        for family in FAMILIES
        if family not in (*NOT_BUILT, *REFUSED, *NO_GRADIENTS)
    ],
)


def answer(model: PreTrainedModel) -> torch.Tensor:
    uncached = "use_cache" in inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False} if uncached else {}
    return model.eval()(IDS, **options).logits


@every_family
def test_adapters_over_all_linear_layers_get_gradients_travel_and_are_merged(
    family: str, tmp_path: Path
) -> None:
    save_tiny(family, tmp_path / "base")
    model = with_adapter(tmp_path / "base", LoraConfig(r=2))

    logits = answer(model)
    logits.float().square().mean().backward()
    save_adapter(model, tmp_path / "adapter")
    again = load(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    result = merge(model, "dequantized", output_folder=tmp_path / "merged", shard_bytes=100_000)

    idle = [path for path, one in lora_modules(model).items() if one.lora_B.grad is None]
    assert [path for path in idle if not any(part in path for part in UNUSED)] == []
    with torch.no_grad():
        torch.testing.assert_close(answer(again), logits, rtol=1e-5, atol=1e-5)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        scale = logits.abs().max().item()
        torch.testing.assert_close(answer(merged), logits, rtol=1e-4, atol=1e-3 * max(1, scale))
    assert result.difference.mean_kl <= 1e-6
