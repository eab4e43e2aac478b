"""Adapters are held to the PEFT library over the dequantized base, in float32: loss, gradients, and files both ways."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from qlora_core import LoraConfig, load_adapter, save_adapter
from qlora_core.nn import adapter_modules, lora_modules, saved_modules
from tests.qlora_core.export.bases import IDS, dequantized, load, logits, with_adapter
from tests.qlora_core.models.families import save_tiny
from tests.tiny_models import save_tiny_llama, save_tiny_qwen2

pytestmark = [
    # peft 0.21 asks transformers 5.23 by an old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning"),
    # It finds out for itself that GPT-2's layers are transposed.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

# Fused projections, experts, biases, parallel blocks, transposed weights; nothing in the engine names OLMo 2, GPT-NeoX
# and StableLM.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "mixtral", "olmo2", "gpt_neox", "stablelm", "falcon", "gpt2")  # fmt: skip

PATTERNS = LoraConfig(
    r=4,
    alpha=10,
    rank_pattern={"q_proj": 2, r"layers\.1\.mlp\..*": 6},
    alpha_pattern={"layers.0.mlp.up_proj": 3, "q_proj": 20},
)
VARIANTS = {
    "rslora": LoraConfig(r=4, alpha=10, use_rslora=True),
    "patterns": PATTERNS,
    "rslora with patterns": replace(PATTERNS, use_rslora=True),
    "some targets": LoraConfig(r=4, alpha=10, target_modules=("q_proj", "self_attn.v_proj", "layers.1.mlp.down_proj")),
    "an expression": LoraConfig(r=4, target_modules=r".*layers\.1.*proj", exclude_modules=("q_proj", "up_proj")),
    "embeddings and head": LoraConfig(r=4, modules_to_save=("embed_tokens", "lm_head")),
    "norms": LoraConfig(r=4, modules_to_save=("model.norm", "input_layernorm")),
}  # fmt: skip
KINDS = {"untied": save_tiny_llama, "tied": save_tiny_qwen2}


def in_peft(config: LoraConfig, *, tied: bool = False) -> peft.LoraConfig:
    """Say the same in PEFT's words."""
    targets, excludes = config.target_modules, config.exclude_modules
    return peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] - a float is as good
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=excludes if isinstance(excludes, str) else list(excludes),
        use_rslora=config.use_rslora,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        modules_to_save=list(config.modules_to_save) or None,
        ensure_weight_tying=tied and "lm_head" in config.modules_to_save,
        task_type="CAUSAL_LM",
    )


def peft_model(folder: Path, config: LoraConfig, *, tied: bool = False) -> Any:
    """Let PEFT put its own adapters over the dequantized base."""
    return peft.get_peft_model(dequantized(folder), in_peft(config, tied=tied))  # pyright: ignore[reportReturnType]


def their_parameters(theirs: Any, ours: Any) -> dict[str, Tensor]:
    """Give PEFT's parameters by the names that ours have."""
    found: dict[str, Tensor] = {}
    for path in lora_modules(ours):
        layer = theirs.base_model.model.get_submodule(path)
        found[f"{path}.lora_A"] = layer.lora_A["default"].weight
        found[f"{path}.lora_B"] = layer.lora_B["default"].weight
    for path, module in saved_modules(ours).items():
        wrapper = theirs.base_model.model.get_submodule(path)
        for name in module.trained:
            found[f"{path}.{name}"] = getattr(wrapper.modules_to_save["default"], name)
    return found


def assert_same_training(ours: Any, theirs: Any) -> None:
    """Same start, then: same loss to 1e-5, same gradients to 1e-4 relative."""
    parameters = their_parameters(theirs, ours)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(ours.get_parameter(name))
    # Adapters have no dropout here; some bases have, and would draw other masks.
    losses = [m.eval()(input_ids=IDS, labels=IDS, use_cache=False).loss for m in (ours, theirs)]
    for loss in losses:
        loss.backward()

    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-5)
    trained = {n for n, p in ours.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert trained == set(parameters)
    n_theirs = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == n_theirs
    for name, parameter in parameters.items():
        mine = ours.get_parameter(name).grad
        assert mine is not None
        assert parameter.grad is not None
        assert parameter.grad.norm() > 0
        assert (mine - parameter.grad).norm() <= 1e-4 * parameter.grad.norm(), name


def assert_files_go_both_ways(ours: Any, theirs: Any, base: Path, folder: Path) -> None:
    """What one saves, the other loads: with the same logits."""
    save_adapter(ours, folder / "ours", base_model_name_or_path=str(base))
    theirs.save_pretrained(str(folder / "theirs"))
    expected = logits(ours)
    assert (logits(load(base)) - expected).abs().max() > 1e-2  # the adapter matters

    loaded = peft.PeftModel.from_pretrained(dequantized(base), str(folder / "ours"))
    back = load(base)
    load_adapter(back, folder / "theirs")

    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(back), expected, rtol=1e-4, atol=1e-4)
    assert list(adapter_modules(back)) == list(adapter_modules(ours))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_and_travels_as_with_peft(family: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_tiny(family, base)
    # PEFT means a mixture's stacked experts as well when it says all-linear; the engine leaves them out, and says so.
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    config = LoraConfig(
        r=4, alpha=10, target_modules=attention if family == "mixtral" else "all-linear"
    )
    ours, theirs = with_adapter(base, config), peft_model(base, config)

    assert_same_training(ours, theirs)
    assert_files_go_both_ways(ours, theirs, base, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_setting_means_what_it_means_in_peft(variant: str, kind: str, tmp_path: Path) -> None:
    base = KINDS[kind](tmp_path / "base")
    config = VARIANTS[variant]
    ours, theirs = with_adapter(base, config), peft_model(base, config, tied=kind == "tied")

    assert_same_training(ours, theirs)
    assert_files_go_both_ways(ours, theirs, base, tmp_path)


def test_dropout_has_the_same_distribution_as_pefts(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base")
    config = LoraConfig(r=4, alpha=30, dropout=0.4)
    ours, theirs = with_adapter(base, config).train(), peft_model(base, config).train()
    with torch.no_grad():
        for name, parameter in their_parameters(theirs, ours).items():
            parameter.copy_(ours.get_parameter(name))
    torch.manual_seed(0)
    n = 150

    with torch.no_grad():
        draws = [
            torch.stack([m(input_ids=IDS, labels=IDS).loss for _ in range(n)]).double()
            for m in (ours, theirs)
        ]

    spread = draws[1].std()
    assert spread > 0.01
    # Each within four standard errors.
    assert (draws[0].mean() - draws[1].mean()).abs() < 4 * spread * (2 / n) ** 0.5
    assert (draws[0].std() / spread).log().abs() < 4 * (1 / n) ** 0.5
