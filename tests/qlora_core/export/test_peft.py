"""Adapters are held to the PEFT library, over the dequantized base in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_core import LoraConfig, NF4Linear, add_lora, load_adapter, load_model, save_adapter
from qlora_core.errors import AdapterError, ConfigError
from qlora_core.nn import lora_modules
from tests.tiny_models import save_tiny_gemma2, save_tiny_llama, save_tiny_qwen2

# peft 0.21 asks transformers 5.23 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")

FAMILIES: dict[str, Callable[..., Path]] = {
    "llama": save_tiny_llama,
    "qwen2": save_tiny_qwen2,
    "gemma2": save_tiny_gemma2,
}
IDS = torch.tensor([[5, 9, 200, 7, 44, 301, 2], [8, 8, 1, 90, 12, 3, 380]])


def _load(folder: Path) -> PreTrainedModel:
    return load_model(folder, device="cpu", compute_dtype=torch.float32)


def _with_random_adapter(folder: Path, config: LoraConfig) -> PreTrainedModel:
    model = _load(folder)
    add_lora(model, config, seed=1)
    torch.manual_seed(2)
    for adapter in lora_modules(model).values():
        torch.nn.init.normal_(adapter.lora_B, std=0.2)
    return model


def _dequantized(folder: Path) -> Any:
    """The base in float32 with the weights that the NF4 codes stand for."""
    dense: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for path, module in _load(folder).named_modules():
        if isinstance(module, NF4Linear):
            with torch.no_grad():
                dense.get_submodule(path).weight.copy_(module.nf4.dequantize(torch.float32))
    return dense.eval()


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(
    "targets", ["all-linear", ("q_proj", "self_attn.v_proj", "down_proj")], ids=["all", "some"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_gives_the_engines_own_logits(family: str, targets: Any, tmp_path: Path) -> None:
    base = FAMILIES[family](tmp_path / "base")
    model = _with_random_adapter(base, LoraConfig(r=4, alpha=10, target_modules=targets))

    save_adapter(model, tmp_path / "adapter", base_model_name_or_path=str(base))

    loaded = peft.PeftModel.from_pretrained(_dequantized(base), str(tmp_path / "adapter"))
    theirs, ours = _logits(loaded), _logits(model)
    assert (theirs - ours).abs().max() <= 1e-3
    assert (_logits(_load(base)) - ours).abs().max() > 1e-2  # the adapter matters


def test_what_peft_saves_is_loaded(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base")
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(_dequantized(base), settings)
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    model = _load(base)

    load_adapter(model, tmp_path / "adapter")

    assert (_logits(theirs) - _logits(model)).abs().max() <= 1e-3


def test_saved_and_loaded_is_the_same_adapter(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base")
    model = _with_random_adapter(base, LoraConfig(r=4, alpha=10, dropout=0.25))
    save_adapter(model, tmp_path / "adapter", base_model_name_or_path="base")
    again = _load(base)

    load_adapter(again, tmp_path / "adapter")

    torch.testing.assert_close(_logits(again), _logits(model), rtol=0, atol=0)
    assert {m.dropout for m in lora_modules(again).values()} == {0.25}
    assert all(m.lora_A.requires_grad for m in lora_modules(again).values())


def test_the_folder_is_what_servers_accept(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base")
    model = _with_random_adapter(base, LoraConfig(r=4, alpha=8))

    written = save_adapter(model, tmp_path / "adapter", base_model_name_or_path='my/"base"')

    assert sorted(path.name for path in written) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (4, 8, True)
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2
    assert tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].shape == (4, 64)
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    card = (tmp_path / "adapter/README.md").read_text(encoding="utf-8")
    assert card.startswith('---\nbase_model: "my/\\"base\\""\n')


def test_a_target_that_names_more_than_was_trained_is_written_in_full(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base")
    only_one = "model.layers.1.mlp.up_proj"
    model = _with_random_adapter(base, LoraConfig(r=4, target_modules=(only_one, "q_proj")))

    save_adapter(model, tmp_path / "adapter", base_model_name_or_path=str(base))

    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == [only_one, "q_proj"]
    loaded = peft.PeftModel.from_pretrained(_dequantized(base), str(tmp_path / "adapter"))
    assert (_logits(loaded) - _logits(model)).abs().max() <= 1e-3


def _edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
        path.write_text(json.dumps(config), encoding="utf-8")

    return edit


def _edit_tensors(edit_tensors: Callable[[dict[str, torch.Tensor]], None]) -> Any:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        edit_tensors(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return edit


Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BROKEN: dict[str, tuple[Any, str]] = {
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model"),
    "torn weights": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x08" * 20), "cannot be read"),
    "config is not json": (lambda folder: (folder / "adapter_config.json").write_text("{"), "not valid JSON"),
    "another method": (_edit_config(peft_type="IA3"), "does not describe a LoRA adapter"),
    "dora": (_edit_config(use_dora=True), "uses use_dora"),
    "modules to save": (_edit_config(modules_to_save=["lm_head"]), "uses modules_to_save"),
    "rank pattern": (_edit_config(rank_pattern={"q_proj": 8}), "uses rank_pattern"),
    "rank": (_edit_config(r="4"), "must give r as a number above 0"),
    "another rank": (_edit_config(r=8), "rank 8 need"),
    "unknown tensor": (_edit_tensors(lambda t: t.update(x=torch.zeros(1))), "unknown tensor x"),
    "half a pair": (_edit_tensors(lambda t: t.__delitem__(Q_A)), "lacks the tensor"),
    "other shape": (_edit_tensors(lambda t: t.update({Q_A: torch.zeros(4, 5)})), "need \\[4, 64\\]"),
    "other model": (_edit_tensors(lambda t: t.update({k.replace("q_proj", "query"): t.pop(k) for k in list(t)})),
                    "no linear layer .*query"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_cannot_be_applied_is_refused(name: str, tmp_path: Path) -> None:
    spoil, message = BROKEN[name]
    base = save_tiny_llama(tmp_path / "base")
    model = _with_random_adapter(base, LoraConfig(r=4, alpha=8))
    save_adapter(model, tmp_path / "adapter", base_model_name_or_path="base")
    spoil(tmp_path / "adapter")
    fresh = _load(base)

    with pytest.raises(AdapterError, match=message):
        load_adapter(fresh, tmp_path / "adapter")

    assert not lora_modules(fresh)


def test_a_model_without_adapters_has_nothing_to_save(tmp_path: Path) -> None:
    model = _load(save_tiny_llama(tmp_path / "base"))

    with pytest.raises(AdapterError, match="no LoRA adapters"):
        save_adapter(model, tmp_path / "adapter", base_model_name_or_path="base")


def test_adapters_do_not_stack(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base")
    model = _with_random_adapter(base, LoraConfig(r=4))
    save_adapter(model, tmp_path / "adapter", base_model_name_or_path="base")

    with pytest.raises(ConfigError, match="adapters already"):
        load_adapter(model, tmp_path / "adapter")
