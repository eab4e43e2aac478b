"""Merged checkpoints: loaded by transformers, rounded once, truthful, and whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_core import LoraConfig, TextEncoder, add_lora, load_model, merge, save_quantized
from qlora_core.errors import AdapterError, ConfigError, ModelUnsupported, ModelWeightsInvalid
from qlora_core.nn import adapter_modules, lora_modules
from tests.qlora_core.export.bases import IDS, load, logits, randomize, with_adapter
from tests.qlora_core.models.families import save_tiny
from tests.tiny_models import save_tiny_gemma2, save_tiny_llama, save_tiny_qwen2

# Renamed and fused checkpoints, experts, transposed weights, shared matrices, several configurations in one.
FAMILIES = ("llama", "qwen2", "gemma3_text", "phi3", "mixtral", "gpt_oss", "qwen3_next", "gpt2", "gpt_neox", "falcon", "mllama")  # fmt: skip
ONTO: tuple[Literal["dequantized", "original"], ...] = ("dequantized", "original")
PLAIN = LoraConfig(r=4, alpha=10)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in bfloat16, as published ones are."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("models") / "llama")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    (folder / "LICENSE").write_text("Do as you like.", encoding="utf-8")
    return folder


def transformers_own(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tensors_in(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_onto_the_dequantized_base_transformers_answers_as_the_trained_model(
    family: str, tmp_path: Path
) -> None:
    save_tiny(family, tmp_path / "base")
    model = with_adapter(tmp_path / "base", PLAIN)

    result = merge(model, "dequantized", output_folder=tmp_path / "merged", shard_bytes=60_000)

    assert tensors_in(tmp_path / "merged").keys() == tensors_in(tmp_path / "base").keys()
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(
        logits(transformers_own(tmp_path / "merged")), logits(model), rtol=1e-4, atol=1e-4
    )
    assert result.difference.max_abs < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_onto_the_original_base_only_the_adapted_weights_differ_by_their_updates(
    family: str, tmp_path: Path
) -> None:
    save_tiny(family, tmp_path / "base")
    model = with_adapter(tmp_path / "base", PLAIN)

    merge(model, "original", output_folder=tmp_path / "merged", original_folder=tmp_path / "base")

    merged, original = (
        dict(transformers_own(tmp_path / one).state_dict()) for one in ("merged", "base")
    )
    updates = {f"{path}.weight": one for path, one in lora_modules(model).items()}
    for name, weight in original.items():
        if name not in updates:
            assert torch.equal(merged[name], weight), name
            continue
        update = 2.5 * updates[name].lora_B.double() @ updates[name].lora_A.double()
        transposed = weight.shape != update.shape or family == "gpt2"
        exact = weight.double() + (update.T if transposed else update)
        torch.testing.assert_close(merged[name].double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("onto", ONTO)
def test_the_sum_is_rounded_to_bfloat16_once(base: Path, tmp_path: Path, onto: Any) -> None:
    model = with_adapter(base, PLAIN)
    folder = base if onto == "original" else None

    result = merge(model, onto, output_folder=tmp_path / "merged", original_folder=folder)

    assert (result.dtype, config_in(result.folder)["dtype"]) == ("bfloat16", "bfloat16")
    written, original = tensors_in(result.folder), tensors_in(base)
    assert {value.dtype for value in written.values()} == {torch.bfloat16}
    assert result.weight_bytes == sum(value.nbytes for value in written.values())
    for path, adapter in lora_modules(model).items():
        name = f"{path}.weight"
        nf4: Any = adapter.base
        start = original[name] if onto == "original" else nf4.nf4.dequantize(torch.float32)
        exact = start.double() + 2.5 * adapter.lora_B.double() @ adapter.lora_A.double()
        # Half the distance between neighbours, which a second rounding would exceed.
        half = torch.exp2(exact.abs().log2().floor() - 8)
        assert ((written[name].double() - exact).abs() <= half + 1e-7).all()


def test_float32_is_written_where_it_is_asked_for(base: Path, tmp_path: Path) -> None:
    model = with_adapter(base, PLAIN)

    result = merge(model, "dequantized", output_folder=tmp_path / "merged", dtype=torch.float32)

    assert {value.dtype for value in tensors_in(result.folder).values()} == {torch.float32}
    torch.testing.assert_close(
        logits(transformers_own(result.folder)), logits(model), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("onto", ONTO)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_was_trained_whole_is_written_and_ties_are_told_as_they_are(
    tmp_path: Path, tied: bool, onto: Any
) -> None:
    build = save_tiny_qwen2 if tied else save_tiny_llama
    base = build(tmp_path / "base")
    names = ("lm_head",) if tied else ("lm_head", "embed_tokens", "model.norm")
    model = with_adapter(base, LoraConfig(r=4, modules_to_save=names))
    folder = base if onto == "original" else None

    merge(model, onto, output_folder=tmp_path / "merged", original_folder=folder)

    assert config_in(tmp_path / "merged")["tie_word_embeddings"] is tied
    written = tensors_in(tmp_path / "merged")
    assert ("lm_head.weight" in written) is not tied
    for path, name in [("model.embed_tokens", "weight"), ("model.norm", "weight")]:
        expected = model.get_submodule(path).get_parameter(name)
        torch.testing.assert_close(written[f"{path}.{name}"], expected.detach(), rtol=0, atol=0)
    if onto == "dequantized":
        torch.testing.assert_close(
            logits(transformers_own(tmp_path / "merged")), logits(model), rtol=1e-4, atol=1e-4
        )


def test_a_base_whose_two_matrices_differ_is_not_said_to_tie_them(tmp_path: Path) -> None:
    base = save_tiny_qwen2(tmp_path / "base", tie_word_embeddings=False)
    path = base / "config.json"
    path.write_text(json.dumps({**config_in(base), "tie_word_embeddings": True}), encoding="utf-8")
    model = with_adapter(base, PLAIN)

    merge(model, "dequantized", output_folder=tmp_path / "merged")

    assert config_in(tmp_path / "merged")["tie_word_embeddings"] is False
    torch.testing.assert_close(
        logits(transformers_own(tmp_path / "merged")), logits(model), rtol=1e-4, atol=1e-4
    )


def test_a_merge_of_a_quantized_checkpoint_is_plain_and_has_all_that_stood_beside_it(
    base: Path, tmp_path: Path
) -> None:
    save_quantized(load(base), tmp_path / "nf4")
    (tmp_path / "nf4/generation_config.json").write_text(
        '{"temperature": 0.25, "do_sample": true}', "utf-8"
    )
    model = with_adapter(tmp_path / "nf4", PLAIN)

    result = merge(model, "dequantized", output_folder=tmp_path / "merged")

    config = config_in(tmp_path / "merged")
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert sorted(path.name for path in result.files) == [
        "LICENSE", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    generation = json.loads((tmp_path / "merged/generation_config.json").read_text("utf-8"))
    assert generation["temperature"] == 0.25
    prompts = [
        TextEncoder.from_folder(one).encode_prompt("hi") for one in (base, tmp_path / "merged")
    ]
    assert prompts[0] == prompts[1]
    torch.testing.assert_close(
        logits(transformers_own(tmp_path / "merged")), logits(model), rtol=0.05, atol=0.05
    )


def test_adapters_over_a_dense_base_are_merged_as_well(base: Path, tmp_path: Path) -> None:
    model = load(base, quantize=False)
    add_lora(model, PLAIN)
    randomize(model)

    result = merge(model, "dequantized", output_folder=tmp_path / "merged", dtype=torch.float32)

    torch.testing.assert_close(
        logits(transformers_own(result.folder)), logits(model), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("save", [save_tiny_llama, save_tiny_qwen2, save_tiny_gemma2], ids=["llama", "qwen2", "gemma2"])  # fmt: skip
@pytest.mark.parametrize("onto", ONTO)
def test_the_difference_told_is_that_of_the_two_models_answers(
    save: Any, onto: Any, tmp_path: Path
) -> None:
    base = save(tmp_path / "base")
    model = with_adapter(base, LoraConfig(r=4, modules_to_save=("embed_tokens", "lm_head")))
    folder = base if onto == "original" else None

    result = merge(
        model,
        onto,
        output_folder=tmp_path / "merged",
        original_folder=folder,
        dtype=torch.bfloat16,
        sample=IDS,
    )

    trained, merged = logits(model).double(), logits(transformers_own(result.folder)).double()
    kl = (trained.softmax(-1) * (trained.log_softmax(-1) - merged.log_softmax(-1))).sum(-1).mean()
    told = result.difference
    assert told.max_abs == pytest.approx((trained - merged).abs().max().item(), rel=1e-3)
    assert told.mean_kl == pytest.approx(kl.item(), rel=1e-3)
    assert told.same_top_share == (trained.argmax(-1) == merged.argmax(-1)).double().mean().item()
    assert told.n_tokens == IDS.numel()


def test_of_a_mixture_the_difference_counts_its_experts(tmp_path: Path) -> None:
    save_tiny("gpt_oss", tmp_path / "base")
    model = with_adapter(tmp_path / "base", PLAIN)

    result = merge(
        model, "original", output_folder=tmp_path / "merged", original_folder=tmp_path / "base", sample=IDS
    )  # fmt: skip

    apart = (logits(model) - logits(transformers_own(result.folder))).abs().max().item()
    assert apart > 1e-4
    assert result.difference.max_abs == pytest.approx(apart, rel=1e-2)


def test_the_model_goes_on_as_if_nothing_had_been(base: Path, tmp_path: Path) -> None:
    model = with_adapter(base, LoraConfig(r=4, modules_to_save=("lm_head",), dropout=0.5))
    before = logits(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()

    merge(model, "dequantized", output_folder=tmp_path / "merged")

    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), before)
    assert not any("forward" in vars(module) for module in model.modules())
    assert len(adapter_modules(model)) == 15


def test_progress_is_told_and_a_merge_that_fails_leaves_nothing(base: Path, tmp_path: Path) -> None:
    model = with_adapter(base, PLAIN)
    told: list[tuple[int, int]] = []

    merge(
        model,
        "dequantized",
        output_folder=tmp_path / "merged",
        on_progress=lambda *at: told.append(at),
    )

    assert told[-1][0] == told[-1][1]
    assert told == sorted(told)

    def fail(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(model, "dequantized", output_folder=tmp_path / "broken", on_progress=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_folder_with_files_in_it_is_replaced_only_when_asked(base: Path, tmp_path: Path) -> None:
    model = with_adapter(base, PLAIN)
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")

    with pytest.raises(ConfigError, match="has files in it"):
        merge(model, "dequantized", output_folder=tmp_path)
    merge(model, "dequantized", output_folder=tmp_path, overwrite=True)

    assert not (tmp_path / "notes.txt").exists()
    with pytest.raises(ConfigError, match="holds the model that is to be saved"):
        merge(model, "dequantized", output_folder=base, overwrite=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"onto": "quantized"}, 'onto "dequantized" .* or "original" .*, not \'quantized\''),
        ({"onto": "original"}, 'merging onto "original" needs original_folder'),
        ({"onto": "dequantized", "original_folder": "x"}, 'merging onto "dequantized" reads no folder'),
        ({"onto": "dequantized", "dtype": torch.int8}, "float16, bfloat16 or float32, not torch.int8"),
        ({"onto": "dequantized", "sample": torch.tensor([[384]])}, "token ids below 384"),
        ({"onto": "dequantized", "sample": torch.tensor([1, 2])}, r"int64 \[texts, tokens\], not torch.int64 \[2\]"),
    ],
    ids=str,
)  # fmt: skip
def test_a_choice_that_cannot_be_meant_is_refused(
    base: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    model = with_adapter(base, PLAIN)

    with pytest.raises(ConfigError, match=message):
        merge(model, output_folder=tmp_path / "merged", **settings)

    assert not (tmp_path / "merged").exists()


def test_there_is_no_base_by_default(base: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="onto"):
        merge(with_adapter(base, PLAIN), output_folder=tmp_path / "merged")  # pyright: ignore[reportCallIssue]


def test_originals_that_are_another_model_are_refused(base: Path, tmp_path: Path) -> None:
    model = with_adapter(base, PLAIN)
    other = save_tiny_llama(tmp_path / "other", seed=1)
    smaller = save_tiny_llama(tmp_path / "smaller")
    tensors = {name: value for name, value in tensors_in(base).items() if ".layers.1." not in name}
    save_file(tensors, smaller / "model.safetensors")
    save_quantized(load(base), tmp_path / "nf4")

    refused = {
        other: (ModelWeightsInvalid, "away from what the model has of it in NF4"),
        smaller: (ModelWeightsInvalid, r"needs model.layers.1.* it is missing"),
        tmp_path / "nf4": (ModelUnsupported, "are quantized; name the folder of the original ones"),
    }
    for folder, (kind, message) in refused.items():
        with pytest.raises(kind, match=message):
            merge(model, "original", output_folder=tmp_path / "merged", original_folder=folder)

    assert not (tmp_path / "merged").exists()


def test_a_model_without_adapters_has_nothing_to_merge(base: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no LoRA adapters to merge"):
        merge(load(base), "dequantized", output_folder=tmp_path / "merged")


def test_a_sixteen_bit_model_is_merged_as_a_float32_one(base: Path, tmp_path: Path) -> None:
    models = [
        load_model(base, device="cpu", compute_dtype=one) for one in (torch.bfloat16, torch.float32)
    ]
    for model in models:
        add_lora(model, PLAIN)
        randomize(model)

    folders = [
        merge(one, "dequantized", output_folder=tmp_path / str(i)).folder
        for i, one in enumerate(models)
    ]

    first, second = (tensors_in(folder) for folder in folders)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
