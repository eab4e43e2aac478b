"""A saved model is what transformers and bitsandbytes load, and a folder is whole or not there."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from qlora_core import NF4Linear, load_model, save_quantized
from tests.qlora_core.models.families import save_tiny
from tests.tiny_models import save_tiny_gemma2, save_tiny_llama, save_tiny_qwen2

IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))


UP = "model.layers.1.mlp.up_proj"


def load(folder: Path, **settings: Any) -> PreTrainedModel:
    return load_model(folder, **{"device": "cpu", "compute_dtype": torch.float32, **settings})


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "llama", intermediate_size=128)


def loaded_by_transformers(folder: Path) -> PreTrainedModel:
    """The model that transformers and bitsandbytes make of a folder, complete, multiplying in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bitsandbytes on a CPU
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, told = loaded
    assert not any(told.values()), told
    model.eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.train()  # else a CPU with AVX512-BF16 multiplies in bfloat16
    return model


def layers(model: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {path for path, module in model.named_modules() if type(module) is kind}


@pytest.mark.parametrize("save", [save_tiny_llama, save_tiny_qwen2, save_tiny_gemma2])
@pytest.mark.parametrize("shard_bytes", [10**9, 30_000], ids=["one file", "shards"])
def test_transformers_and_bitsandbytes_load_it_with_equal_logits(
    tmp_path: Path, save: Callable[..., Path], shard_bytes: int
) -> None:
    model = load(save(tmp_path / "dense", intermediate_size=128))

    save_quantized(model, tmp_path / "nf4", shard_bytes=shard_bytes)

    theirs = loaded_by_transformers(tmp_path / "nf4")
    assert layers(theirs, Linear4bit) == layers(model, NF4Linear)
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(load(tmp_path / "nf4")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"block_size": 32},
        {"block_size": 4096},
        {"double_quant": False},
        {"scale": "mse"},
        {"skip_modules": ()},
        {"skip_modules": ("lm_head", "model.layers.0.self_attn", "layers.1.mlp.up_proj")},
    ],
    ids=str,
)
def test_every_way_of_quantizing_comes_back_bit_for_bit(
    tmp_path: Path, llama: Path, settings: dict[str, Any]
) -> None:
    model = load(llama, **settings)

    save_quantized(model, tmp_path / "nf4")

    theirs, again = loaded_by_transformers(tmp_path / "nf4"), load(tmp_path / "nf4")
    quantized = layers(model, NF4Linear)
    assert layers(theirs, Linear4bit) == layers(again, NF4Linear) == quantized
    assert layers(theirs, nn.Linear) == layers(again, nn.Linear) == layers(model, nn.Linear)
    for path in quantized:
        ours, other = model.get_submodule(path), again.get_submodule(path)
        assert isinstance(ours, NF4Linear)
        for (name, one), (_, two) in zip(ours.named_buffers(), other.named_buffers(), strict=True):
            assert torch.equal(one, two), f"{path}.{name}"
        weight: Any = theirs.get_submodule(path).weight
        assert torch.equal(weight.data.view(-1), ours.packed)
        assert weight.quant_state.blocksize == ours.block_size
        assert weight.quant_state.nested is ours.nf4.double_quant


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "olmo2", "bart", "qwen3"])
def test_keys_are_those_that_transformers_itself_writes(tmp_path: Path, family: str) -> None:
    save_tiny(family, tmp_path / "dense")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "theirs")

    save_quantized(load(tmp_path / "dense"), tmp_path / "ours")

    ours, expected = (
        load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs")
    )
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (ours[key].dtype, ours[key].shape) == (tensor.dtype, tensor.shape), key


def test_a_mixture_is_saved_with_its_experts_dense(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "dense")
    model = load(tmp_path / "dense", skip_modules=("lm_head", "experts"))

    save_quantized(model, tmp_path / "nf4")

    theirs = loaded_by_transformers(tmp_path / "nf4")
    theirs.set_experts_implementation("eager")
    assert layers(theirs, Linear4bit) == layers(model, NF4Linear)
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_the_config_says_what_transformers_wants_to_know(tmp_path: Path, llama: Path) -> None:
    model = load(llama, skip_modules=("lm_head", UP), compute_dtype=torch.bfloat16)

    save_quantized(model, tmp_path / "nf4")

    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    told = config["quantization_config"]
    assert set(told["llm_int8_skip_modules"]) == {"lm_head", UP}
    assert (told["quant_method"], told["load_in_4bit"]) == ("bitsandbytes", True)
    assert (told["bnb_4bit_quant_type"], told["bnb_4bit_use_double_quant"]) == ("nf4", True)
    assert told["bnb_4bit_compute_dtype"] == config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert getattr(model.config, "quantization_config", None) is None


def test_the_tokenizer_its_template_and_the_generation_settings_come_along(
    tmp_path: Path, llama: Path
) -> None:
    (llama / "chat_template.jinja").write_text("{{ messages }}")
    (llama / "additional_chat_templates").mkdir()
    (llama / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    (llama / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (llama / "LICENSE.txt").write_text("do what you like")
    (llama / "training.json").write_text("{}")

    written = save_quantized(load(llama), tmp_path / "nf4")

    names = {str(path.relative_to(tmp_path / "nf4")) for path in written}
    assert names == {
        "LICENSE.txt",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert all(path.is_file() for path in written)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "nf4").chat_template["default"] == "{{ messages }}"
    )
    assert load(tmp_path / "nf4").generation_config.eos_token_id == [2, 7]  # pyright: ignore[reportOptionalMemberAccess]


def test_a_model_from_nowhere_is_saved_without_a_tokenizer(tmp_path: Path, llama: Path) -> None:
    model = load(llama)
    model.config._name_or_path = ""

    written = save_quantized(model, tmp_path / "nf4")

    assert {path.name for path in written} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_shards_are_as_large_as_asked_and_the_index_leads_to_them(
    tmp_path: Path, llama: Path
) -> None:
    save_quantized(load(llama), tmp_path / "nf4", shard_bytes=40_000)

    index = json.loads((tmp_path / "nf4" / "model.safetensors.index.json").read_text())
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(index["weight_map"].values())):
        held = load_file(tmp_path / "nf4" / name)
        assert {key for key, shard in index["weight_map"].items() if shard == name} == held.keys()
        nbytes = sum(tensor.nbytes for tensor in held.values())
        assert nbytes <= 40_000 or len(held) == 1
        tensors |= held
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_progress_counts_the_bytes_up_to_all_of_them(tmp_path: Path, llama: Path) -> None:
    told: list[tuple[int, int]] = []

    save_quantized(load(llama), tmp_path / "nf4", on_progress=lambda *bytes_: told.append(bytes_))

    total = sum(t.nbytes for t in load_file(tmp_path / "nf4" / "model.safetensors").values())
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (total, total)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("No space left on device")])
def test_what_is_interrupted_leaves_nothing_behind(
    tmp_path: Path, llama: Path, error: BaseException
) -> None:
    def fail(done: int, total: int) -> None:
        if done > total / 2:
            raise error

    model = load(llama)
    (tmp_path / "out" / "nf4").mkdir(parents=True)

    with pytest.raises(type(error)):
        save_quantized(model, tmp_path / "out" / "nf4", on_progress=fail)

    assert list(tmp_path.joinpath("out").rglob("*")) == [tmp_path / "out" / "nf4"]
