"""Folders, configurations and settings that cannot be loaded are refused with a code and a sentence that says why."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_core import ModelError, load_model
from qlora_core.errors import ConfigError
from tests.qlora_core.models.refusals import edit_json, refusal
from tests.tiny_models import save_tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "model")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    error = refusal(tmp_path / "nowhere")

    assert error.code == "model_not_found"
    assert "nowhere" in error.message


def test_a_folder_without_a_config(folder: Path) -> None:
    (folder / "config.json").unlink()

    error = refusal(folder)

    assert error.code == "model_not_found"
    assert "no config.json" in error.message


@pytest.mark.parametrize("text", ["{", "[]", "\udcff", '{"model_type": 3}', "{}"], ids=repr)
def test_a_config_that_cannot_be_read(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))

    error = refusal(folder)

    assert error.code == "model_unsupported"
    assert "config.json" in error.message


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "no_such_model"},
        {"model_type": "t5"},
        {"num_attention_heads": 0},
        {"hidden_size": -64},
        {"hidden_size": "wide"},
        {"hidden_size": 2**40},
        {"hidden_size": None},
        {"vocab_size": [384]},
        {"rope_parameters": "long"},
        {"hidden_act": 3},
        {"num_hidden_layers": {}},
    ],
    ids=str,
)
def test_a_config_that_no_causal_language_model_has(folder: Path, changes: dict[str, Any]) -> None:
    edit_json(folder / "config.json", **changes)

    assert refusal(folder).code == "model_unsupported"


def test_code_in_the_folder_is_never_run(folder: Path, tmp_path: Path) -> None:
    proof = tmp_path / "it ran"
    (folder / "evil.py").write_text(f"from pathlib import Path; Path({str(proof)!r}).touch()")
    edit_json(
        folder / "config.json",
        model_type="evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )

    error = refusal(folder)

    assert error.code == "model_unsupported"
    assert not proof.exists()


def test_a_checkpoint_that_is_quantized_already(folder: Path) -> None:
    edit_json(
        folder / "config.json",
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
    )

    error = refusal(folder)

    assert error.code == "model_unsupported"
    assert "quantized already" in error.message


LONG = "x" * 100_000


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": LONG},
        {"hidden_act": LONG},
        {"hidden_size": LONG},
        {"quantization_config": {"quant_method": LONG}},
        {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": LONG}},
        {"quantization_config": LONG},
    ],
    ids=[
        "model_type",
        "hidden_act",
        "hidden_size",
        "quant_method",
        "quant_type",
        "quantization_config",
    ],
)
def test_a_long_value_in_the_config_does_not_make_a_long_message(
    folder: Path, changes: dict[str, Any]
) -> None:
    edit_json(folder / "config.json", **changes)

    assert refusal(folder).code == "model_unsupported"


@pytest.mark.parametrize("value", ["float32", None, torch.float64, torch.int8, "auto"], ids=str)
def test_a_compute_dtype_that_there_is_not(folder: Path, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"compute_dtype must be torch\.float16, .* not "):
        load_model(folder, device="cpu", compute_dtype=value)


@pytest.mark.parametrize(
    "value", ["meta", "mps", "gpu", "", None, 1.5, LONG], ids=lambda v: f"{v}"[:9]
)
def test_a_device_that_there_is_not(folder: Path, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"device must be cpu or cuda, not ") as told:
        load_model(folder, device=value, compute_dtype=torch.float32)

    assert len(told.value.message) < 300


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no GPU"):
        load_model(folder, device="cuda", compute_dtype=torch.float32)


@pytest.mark.gpu
def test_a_gpu_beyond_those_there_are(folder: Path) -> None:
    with pytest.raises(ConfigError, match="device is cuda:99, but there "):
        load_model(folder, device="cuda:99", compute_dtype=torch.float32)


def test_a_generation_config_that_cannot_be_read(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")

    error = refusal(folder)

    assert error.code == "model_unsupported"
    assert "generation_config.json" in error.message


def test_a_layer_that_is_read_past_its_call_is_refused_in_a_sentence(folder: Path) -> None:
    model = load_model(folder, device="cpu", compute_dtype=torch.float32)

    with pytest.raises(ModelError, match="reads the weight of a linear layer directly"):
        _ = model.get_submodule("model.layers.0.mlp.up_proj").weight
