"""Checkpoints that transformers and bitsandbytes have quantized are loaded as they are."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from qlora_core import NF4Linear, load_model
from qlora_core.errors import ModelError, ModelUnsupported, ModelWeightsInvalid
from tests.qlora_core.models.families import save_tiny
from tests.tiny_models import save_tiny_gemma2, save_tiny_llama, save_tiny_qwen2

IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
UP = "model.layers.1.mlp.up_proj"


def load(folder: Path, **settings: Any) -> PreTrainedModel:
    return load_model(folder, **{"device": "cpu", "compute_dtype": torch.float32, **settings})


def tiny_llama(folder: Path) -> Path:
    return save_tiny_llama(folder, intermediate_size=128)


def quantize_with_bitsandbytes(
    folder: Path, out: Path, **settings: Any
) -> tuple[PreTrainedModel, Path]:
    """Let transformers quantize the model of ``folder`` and save it to ``out``; give its model too."""
    config = BitsAndBytesConfig(
        **{
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.float32,
            **settings,
        }
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bitsandbytes on a CPU
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.float32
        ).eval()
        model.save_pretrained(out)
    return model, out


def their_logits(model: PreTrainedModel) -> Tensor:
    """What transformers and bitsandbytes compute in float32.

    In evaluation on a CPU with AVX512-BF16, bitsandbytes packs the weights anew and multiplies in bfloat16; and it
    dequantizes wrongly where a block reaches from one row into the next (0.50.2).
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            assert module.in_features % 64 == 0
            module.train()
    return model(IDS).logits


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def same_bits(layer: NF4Linear, theirs: Any) -> bool:
    state = theirs.weight.quant_state
    scales: Any = state.state2.absmax if state.nested else None
    return (
        torch.equal(layer.packed, theirs.weight.data.view(-1).view(torch.uint8))
        and torch.equal(layer.absmax, state.absmax)
        and (layer.nested_absmax is None or torch.equal(layer.nested_absmax, scales))
        and (layer.offset is None or torch.equal(layer.offset, state.offset))
    )


@pytest.mark.parametrize("save", [save_tiny_llama, save_tiny_qwen2, save_tiny_gemma2])
@pytest.mark.parametrize("double_quant", [True, False])
def test_every_layer_has_the_same_bits_and_the_model_the_same_logits(
    tmp_path: Path, save: Callable[..., Path], double_quant: bool
) -> None:
    theirs, folder = quantize_with_bitsandbytes(
        save(tmp_path / "dense", intermediate_size=128),
        tmp_path / "nf4",
        bnb_4bit_use_double_quant=double_quant,
    )

    model = load(folder)

    quantized = [path for path, one in theirs.named_modules() if isinstance(one, Linear4bit)]
    assert len(quantized) == 14
    for path in quantized:
        layer = model.get_submodule(path)
        assert isinstance(layer, NF4Linear)
        assert same_bits(layer, theirs.get_submodule(path))
    torch.testing.assert_close(model(IDS).logits, their_logits(theirs), rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_layers_that_were_left_dense_stay_dense_whatever_the_caller_skips(tmp_path: Path) -> None:
    theirs, folder = quantize_with_bitsandbytes(
        tiny_llama(tmp_path / "dense"),
        tmp_path / "nf4",
        llm_int8_skip_modules=["model.layers.0.self_attn", UP],
    )

    model = load(folder, skip_modules=())

    dense = {path for path, one in model.named_modules() if isinstance(one, nn.Linear)}
    attention = {f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"}
    # transformers leaves the head to the list, which does not name it.
    assert dense == {UP, *attention}
    assert isinstance(model.get_submodule("lm_head"), NF4Linear)
    torch.testing.assert_close(model(IDS).logits, their_logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_codes_that_are_stored_as_another_dtype(tmp_path: Path, storage: torch.dtype) -> None:
    theirs, folder = quantize_with_bitsandbytes(
        tiny_llama(tmp_path / "dense"), tmp_path / "nf4", bnb_4bit_quant_storage=storage
    )
    assert load_file(folder / "model.safetensors")[f"{UP}.weight"].dtype == storage

    model = load(folder)

    torch.testing.assert_close(model(IDS).logits, their_logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss", "qwen3_next"])
def test_families_whose_layers_or_names_are_their_own(tmp_path: Path, family: str) -> None:
    save_tiny(family, tmp_path / "dense")
    theirs, folder = quantize_with_bitsandbytes(tmp_path / "dense", tmp_path / "nf4")

    model = load(folder)

    quantized = {path for path, one in theirs.named_modules() if isinstance(one, Linear4bit)}
    assert quantized
    assert {p for p, one in model.named_modules() if isinstance(one, NF4Linear)} == quantized
    torch.testing.assert_close(
        model(IDS, use_cache=False).logits,
        their_logits(theirs),
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_callers_compute_dtype_counts(tmp_path: Path) -> None:
    _, folder = quantize_with_bitsandbytes(
        tiny_llama(tmp_path / "dense"),
        tmp_path / "nf4",
        bnb_4bit_compute_dtype=torch.float16,
    )

    model = load(folder, compute_dtype=torch.bfloat16)

    layer = model.get_submodule(UP)
    assert isinstance(layer, NF4Linear)
    assert layer.compute_dtype == torch.bfloat16
    assert model.get_submodule("model.norm").weight.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_unquantized_the_model_is_dense_and_computes_the_same(tmp_path: Path, family: str) -> None:
    save_tiny(family, tmp_path / "dense")
    _, folder = quantize_with_bitsandbytes(tmp_path / "dense", tmp_path / "nf4")

    dense, quantized = load(folder, quantize=False), load(folder)

    assert not any(isinstance(one, NF4Linear) for one in dense.modules())
    torch.testing.assert_close(dense(IDS).logits, quantized(IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_whose_config_does_not_tell_is_known_by_its_tensors(tmp_path: Path) -> None:
    theirs, folder = quantize_with_bitsandbytes(tiny_llama(tmp_path / "d"), tmp_path / "nf4")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))

    torch.testing.assert_close(load(folder)(IDS).logits, their_logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prequantized")
    return quantize_with_bitsandbytes(tiny_llama(folder / "dense"), folder / "nf4")[1]


@pytest.fixture
def nf4(made: Path, tmp_path: Path) -> Path:
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def refusal(folder: Path, error: type[ModelError]) -> str:
    with pytest.raises(error) as told:
        load(folder)
    assert "\n" not in told.value.message
    return told.value.message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quant_method": "gptq"}, "'gptq'"),
        ({"quant_method": None}, "None"),
        ({"load_in_8bit": True, "load_in_4bit": False}, "int8 (load_in_8bit)"),
        ({"bnb_4bit_quant_type": "fp4"}, "fp4 (bnb_4bit_quant_type)"),
    ],
    ids=str,
)
def test_another_format_is_refused_by_name_with_what_to_do(
    nf4: Path, changes: dict[str, Any], named: str
) -> None:
    edit_config(nf4, **changes)

    message = refusal(nf4, ModelUnsupported)

    assert named in message
    assert "start from its 16- or 32-bit weights" in message


def test_real_fp4_weights_are_refused_also_if_the_config_is_silent(tmp_path: Path) -> None:
    _, folder = quantize_with_bitsandbytes(
        tiny_llama(tmp_path / "dense"), tmp_path / "fp4", bnb_4bit_quant_type="fp4"
    )
    edit_config(folder, bnb_4bit_quant_type="nf4")

    assert "model.layers.0.mlp.down_proj.weight is quantized already, to fp4" in refusal(
        folder, ModelUnsupported
    )


@pytest.mark.parametrize("value", ["4bit", [1], 3])
def test_a_quantization_config_that_is_none(nf4: Path, value: Any) -> None:
    config = json.loads((nf4 / "config.json").read_text())
    (nf4 / "config.json").write_text(json.dumps({**config, "quantization_config": value}))

    assert "quantization_config" in refusal(nf4, ModelUnsupported)


def test_a_config_that_promises_4_bits_over_dense_weights(nf4: Path, tmp_path: Path) -> None:
    dense = tiny_llama(tmp_path / "dense")
    (dense / "config.json").write_bytes((nf4 / "config.json").read_bytes())

    assert "says that its weights are quantized, but none" in refusal(dense, ModelWeightsInvalid)


@pytest.mark.parametrize("suffix", [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"])
def test_a_missing_tensor_of_a_layer_is_named(nf4: Path, suffix: str) -> None:
    edit_weights(nf4, lambda tensors: tensors.pop(f"{UP}.weight{suffix}"))

    assert f"lacks the tensor {UP}.weight{suffix}" in refusal(nf4, ModelWeightsInvalid)


def test_a_layers_state_without_its_weight_is_named(nf4: Path) -> None:
    edit_weights(nf4, lambda tensors: tensors.pop(f"{UP}.weight"))

    assert f"but not {UP}.weight itself" in refusal(nf4, ModelWeightsInvalid)


def test_a_layers_tensors_without_its_state_are_named(nf4: Path) -> None:
    key = f"{UP}.weight.quant_state.bitsandbytes__nf4"
    edit_weights(nf4, lambda tensors: tensors.pop(key))

    assert f"{UP}.weight.absmax" in refusal(nf4, ModelWeightsInvalid)


def test_a_layer_of_another_shape_is_named(nf4: Path) -> None:
    def swap(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(f"{UP}.weight")]:
            tensors[key] = tensors[key.replace("up_proj", "down_proj")].clone()

    edit_weights(nf4, swap)

    message = refusal(nf4, ModelWeightsInvalid)

    assert (
        f"{UP}.weight is [64, 128] in the checkpoint, but config.json makes it [128, 64]" in message
    )


def test_a_quantized_embedding_is_refused_by_name(nf4: Path) -> None:
    def quantize_norm(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(f"{UP}.weight")]:
            tensors[key.replace(UP, "model.embed_tokens")] = tensors[key].clone()

    edit_weights(nf4, quantize_norm)

    assert "model.embed_tokens.weight is in NF4" in refusal(nf4, ModelUnsupported)


def test_a_layer_that_the_architecture_fuses_is_refused_by_name(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(key for key in tensors if key.endswith("experts.0.w1.weight"))
    from qlora_core import quantize_nf4

    tensors |= quantize_nf4(tensors.pop(name)).to_bitsandbytes(name)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    message = refusal(tmp_path, ModelUnsupported)

    assert name in message
    assert "start from the 16- or 32-bit weights" in message


@pytest.mark.parametrize("offset", [-1e38, 1e38])
def test_scales_that_the_compute_dtype_cannot_hold_are_refused(nf4: Path, offset: float) -> None:
    key = f"{UP}.weight.quant_state.bitsandbytes__nf4"

    def shift(tensors: dict[str, Tensor]) -> None:
        state = json.loads(bytes(tensors[key].tolist())) | {"nested_offset": offset}
        tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    edit_weights(nf4, shift)

    with pytest.raises(ModelWeightsInvalid, match=f"{UP}.weight holds numbers that are too large"):
        load(nf4, compute_dtype=torch.float16)
