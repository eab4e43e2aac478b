"""Tensors under other names than the model's, or fused in the file, come to their places as in transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_core import NF4Linear, load_model
from tests.tiny_models import save_tiny_llama, save_tiny_qwen2

IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))


def load(folder: Path, **settings: object) -> PreTrainedModel:
    return load_model(folder, **{"device": "cpu", "compute_dtype": torch.float32, **settings})  # pyright: ignore[reportArgumentType]


def transformers_own(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def test_a_tied_head_that_is_stored_under_its_own_name_only_is_found(tmp_path: Path) -> None:
    folder = save_tiny_qwen2(tmp_path)
    expected = load(folder)(IDS).logits
    edit_weights(folder, lambda tensors: rename(tensors, "model.embed_tokens", "lm_head"))

    assert torch.equal(load(folder)(IDS).logits, expected)


def test_names_of_older_checkpoints_are_renamed_as_transformers_does(tmp_path: Path) -> None:
    # transformers stores LayerNorm.gamma and .beta of old checkpoints as weight and bias.
    folder = save_tiny_llama(tmp_path)
    expected = load(folder)(IDS).logits
    edit_weights(
        folder, lambda tensors: rename(tensors, "model.norm.weight", "model.norm.LayerNorm.gamma")
    )
    with pytest.raises(Exception, match=r"model\.norm\.LayerNorm\.gamma"):
        load(folder)  # Llama has no such module, so the new name must not fit either
    edit_weights(
        folder, lambda tensors: rename(tensors, "model.norm.LayerNorm.gamma", "model.norm.weight")
    )

    assert torch.equal(load(folder)(IDS).logits, expected)


def test_a_checkpoint_of_the_base_model_without_its_prefix_is_loaded(tmp_path: Path) -> None:
    folder = save_tiny_qwen2(tmp_path)
    expected = load(folder)(IDS).logits
    edit_weights(
        folder, lambda tensors: {name.removeprefix("model."): t for name, t in tensors.items()}
    )

    assert torch.equal(load(folder)(IDS).logits, expected)


def test_fused_checkpoint_tensors_are_split_by_transformers_own_conversion(tmp_path: Path) -> None:
    from transformers import AutoConfig

    # HRM stores gate|up and gate|q|k|v each as one tensor; the model has them apart.
    config = AutoConfig.for_model(
        "hrm_text",
        vocab_size=384,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert any(name.endswith("gate_up_proj.weight") for name in stored)

    model = load(tmp_path)

    expected = transformers_own(tmp_path)
    for path, module in model.named_modules():
        if isinstance(module, NF4Linear):
            linear = expected.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            linear.weight.data.copy_(module.nf4.dequantize())
    assert sum("gate_proj" in name for name, _ in model.named_modules()) > 0
    assert torch.equal(model(IDS).logits, expected(IDS).logits)


def test_saved_rotary_frequencies_of_older_checkpoints_are_ignored(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path)
    expected = load(folder)(IDS).logits
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder, lambda tensors: {**tensors, name: torch.ones(8)})

    assert torch.equal(load(folder)(IDS).logits, expected)


def edit_weights(
    folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}
