"""Loading is quantizing the dense model: whatever the family, the shards or the names in the file."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_core import (
    NF4Linear,
    load_model,
    quantize_nf4,
    save_quantized,
)
from tests.qlora_core.models.families import save_tiny
from tests.tiny_models import save_tiny_gemma2, save_tiny_llama, save_tiny_qwen2

Save = Callable[..., Path]


FAMILIES = [save_tiny_llama, save_tiny_qwen2, save_tiny_gemma2]


IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))


def load(folder: Path, **settings: object) -> PreTrainedModel:
    return load_model(folder, **{"device": "cpu", "compute_dtype": torch.float32, **settings})  # pyright: ignore[reportArgumentType]


def transformers_own(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("save", FAMILIES)
@pytest.mark.parametrize("shard_bytes", [None, 60_000], ids=["one file", "shards"])
def test_the_model_is_transformers_own_with_every_linear_quantized(
    tmp_path: Path, save: Save, shard_bytes: int | None
) -> None:
    folder = save(tmp_path, shard_bytes=shard_bytes)

    model = load(folder)

    expected = transformers_own(folder)
    quantized = [path for path, module in model.named_modules() if isinstance(module, NF4Linear)]
    assert len(quantized) == 14
    for path in quantized:
        linear = expected.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        layer = model.get_submodule(path)
        assert isinstance(layer, NF4Linear)
        dense = quantize_nf4(linear.weight.detach()).dequantize()
        assert torch.equal(layer.nf4.dequantize(), dense)
        linear.weight.data.copy_(dense)
    assert torch.equal(model(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize("save", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_without_quantizing_every_tensor_is_transformers_own(
    tmp_path: Path, save: Save, dtype: torch.dtype
) -> None:
    folder = save(tmp_path)

    model = load(folder, quantize=False, compute_dtype=dtype)

    expected = transformers_own(folder, dtype)
    actual = dict(model.named_parameters()) | dict(model.named_buffers())
    wanted = dict(expected.named_parameters()) | dict(expected.named_buffers())
    assert actual.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("save", FAMILIES)
def test_nothing_is_left_on_the_meta_device_and_nothing_is_trainable(
    tmp_path: Path, save: Save
) -> None:
    model = load(save(tmp_path))

    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


def test_biases_are_kept(tmp_path: Path) -> None:
    folder = save_tiny_qwen2(tmp_path)

    model = load(folder)

    stored = load_file(folder / "model.safetensors")
    layer = model.get_submodule("model.layers.1.self_attn.k_proj")
    assert isinstance(layer, NF4Linear)
    assert layer.bias is not None
    assert torch.equal(layer.bias, stored["model.layers.1.self_attn.k_proj.bias"])


@pytest.mark.parametrize("save", [save_tiny_qwen2, save_tiny_gemma2])
def test_a_tied_head_shares_the_embeddings_memory(tmp_path: Path, save: Save) -> None:
    model = load(save(tmp_path), skip_modules=())

    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, nn.Linear)
    assert isinstance(embeddings, nn.Embedding)
    assert head.weight is embeddings.weight


def test_an_untied_head_stays_dense_unless_told_otherwise(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path)

    default, all_quantized = load(folder), load(folder, skip_modules=())

    assert isinstance(default.get_output_embeddings(), nn.Linear)
    assert isinstance(all_quantized.get_output_embeddings(), NF4Linear)


@pytest.mark.parametrize(
    ("skip", "n_dense"),
    [("down_proj", 2), ("model.layers.0", 7), ("self_attn", 8), ("layers.1.mlp.up_proj", 1)],
)
def test_skipped_modules_stay_dense(tmp_path: Path, skip: str, n_dense: int) -> None:
    model = load(save_tiny_llama(tmp_path), skip_modules=("lm_head", skip))

    dense = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(dense) == n_dense + 1
    assert all(path == "lm_head" or f".{skip}." in f".{path}." for path in dense)


def test_modules_that_the_architecture_wants_in_float32_stay_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    folder = save_tiny_llama(tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"norm"})

    model = load(folder, compute_dtype=torch.bfloat16)

    expected = transformers_own(folder, torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes == {
        name: parameter.dtype for name, parameter in expected.named_parameters() if name in dtypes
    }
    assert dtypes["model.norm.weight"] == torch.float32
    assert dtypes["model.embed_tokens.weight"] == torch.bfloat16


@pytest.mark.gpu
def test_on_a_gpu_the_weights_are_those_of_the_cpu(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path)

    on_gpu = load(folder, device="cuda", compute_dtype=torch.bfloat16)
    on_cpu = load(folder, compute_dtype=torch.bfloat16)

    for path, module in on_gpu.named_modules():
        if isinstance(module, NF4Linear):
            other = on_cpu.get_submodule(path)
            assert isinstance(other, NF4Linear)
            assert torch.equal(module.packed.cpu(), other.packed)
    torch.testing.assert_close(
        on_gpu(IDS.cuda()).logits.cpu().float(), on_cpu(IDS).logits.float(), rtol=0.1, atol=0.1
    )


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_on_a_gpu_a_family_and_its_saved_form_are_those_of_the_cpu(
    tmp_path: Path, family: str
) -> None:
    save_tiny(family, tmp_path / "dense")
    on_cpu = load(tmp_path / "dense", skip_modules=("lm_head", "experts"))
    on_gpu = load(tmp_path / "dense", device="cuda", skip_modules=("lm_head", "experts"))
    save_quantized(on_gpu, tmp_path / "nf4")

    again = load(tmp_path / "nf4", device="cuda")

    for path, module in on_cpu.named_modules():
        if isinstance(module, NF4Linear):
            for other in (on_gpu.get_submodule(path), again.get_submodule(path)):
                assert isinstance(other, NF4Linear)
                assert torch.equal(module.packed, other.packed.cpu())
    torch.testing.assert_close(
        again(IDS.remainder(100).cuda()).logits.cpu(),
        on_cpu(IDS.remainder(100)).logits,
        rtol=1e-2,
        atol=1e-2,
    )
