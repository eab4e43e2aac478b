"""What would replace the wrong folder, or what nothing could read, is refused before anything is written."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from qlora_core import LoraConfig, add_lora, load_model, save_quantized
from qlora_core.errors import ConfigError, ModelUnsupported
from tests.qlora_core.models.families import save_tiny
from tests.tiny_models import save_tiny_llama

IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))


def load(folder: Path, **settings: Any) -> PreTrainedModel:
    return load_model(folder, **{"device": "cpu", "compute_dtype": torch.float32, **settings})


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "llama", intermediate_size=128)


def test_a_folder_with_files_in_it_is_refused_and_left_as_it_is(
    tmp_path: Path, llama: Path
) -> None:
    model = load(llama)
    (tmp_path / "nf4").mkdir()
    (tmp_path / "nf4" / "mine.txt").write_text("keep")

    with pytest.raises(ConfigError, match="nf4 has files in it"):
        save_quantized(model, tmp_path / "nf4")

    assert [path.name for path in (tmp_path / "nf4").iterdir()] == ["mine.txt"]


def test_a_folder_is_replaced_where_that_is_asked_for(tmp_path: Path, llama: Path) -> None:
    model = load(llama)
    (tmp_path / "nf4").mkdir()
    (tmp_path / "nf4" / "model-00001-of-00002.safetensors").write_text("old")

    save_quantized(model, tmp_path / "nf4", overwrite=True)

    assert not (tmp_path / "nf4" / "model-00001-of-00002.safetensors").exists()
    assert torch.equal(load(tmp_path / "nf4")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("target", [".", ".."])
def test_the_model_is_never_replaced_by_itself(llama: Path, target: str) -> None:
    model = load(llama)

    with pytest.raises(ConfigError, match="holds the model that is to be saved"):
        save_quantized(model, llama / target, overwrite=True)

    assert (llama / "model.safetensors").is_file()


def test_a_file_is_no_folder(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match="is a file"):
        save_quantized(load(llama), tmp_path / "file", overwrite=True)


def refusal(model: PreTrainedModel, folder: Path) -> str:
    with pytest.raises(ModelUnsupported) as told:
        save_quantized(model, folder)
    assert not folder.exists()
    return told.value.message


def test_a_model_with_adapters_is_refused(tmp_path: Path, llama: Path) -> None:
    model = load(llama)
    add_lora(model, LoraConfig())

    assert "has an adapter" in refusal(model, tmp_path / "nf4")


def test_experts_in_nf4_are_refused_by_name(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "dense")

    message = refusal(load(tmp_path / "dense"), tmp_path / "nf4")

    assert "model.layers.0.mlp.experts.gate_up_proj holds experts in NF4" in message


def test_a_layer_that_transformers_would_leave_dense_is_refused_by_name(tmp_path: Path) -> None:
    save_tiny("falcon", tmp_path / "dense")

    message = refusal(load(tmp_path / "dense"), tmp_path / "nf4")

    assert "transformer.h.0.self_attention.query_key_value is a FalconLinear" in message


@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_8bit": True},
    ],
    ids=str,
)
def test_a_model_that_transformers_has_quantized_is_refused(
    tmp_path: Path, llama: Path, settings: dict[str, Any]
) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.float32
    )

    message = refusal(theirs, tmp_path / "nf4")

    assert "was quantized by transformers (bitsandbytes), not by load_model" in message


@pytest.mark.parametrize(
    "change",
    [
        lambda linear: setattr(linear, "weight", nn.Parameter(linear.weight[:3])),
        lambda linear: setattr(linear, "weight", nn.Parameter(linear.weight.to("meta"))),
        lambda linear: setattr(linear, "weight", nn.Parameter(linear.weight.double())),
        lambda linear: delattr(linear, "weight"),
    ],
    ids=["shape", "meta", "dtype", "missing"],
)
def test_a_dense_layer_that_is_not_the_architectures_is_refused_by_name(
    tmp_path: Path, llama: Path, change: Callable[[nn.Module], None]
) -> None:
    model = load(llama)
    change(model.get_submodule("lm_head"))

    assert refusal(model, tmp_path / "nf4").startswith("lm_head.weight is ")


@pytest.mark.parametrize("own", [True, False])
def test_a_model_without_a_layer_in_nf4_is_refused(tmp_path: Path, llama: Path, own: bool) -> None:
    model = load(llama, quantize=False) if own else AutoModelForCausalLM.from_pretrained(llama)

    with pytest.raises(ConfigError, match="no layer of the model is in NF4"):
        save_quantized(model, tmp_path / "nf4")

    assert not (tmp_path / "nf4").exists()


def test_transformers_own_saving_is_refused_where_it_would_write_what_nothing_reads(
    tmp_path: Path, llama: Path
) -> None:
    save_quantized(load(llama), tmp_path / "nf4")

    for model in (load(llama), deepcopy(load(llama)), load(tmp_path / "nf4")):
        with pytest.raises(ConfigError, match="save_pretrained would write NF4 layers"):
            model.save_pretrained(tmp_path / "theirs")

    load(tmp_path / "nf4", quantize=False).save_pretrained(tmp_path / "dense")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(IDS).logits.isfinite().all()
