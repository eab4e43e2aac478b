"""Experts in NF4 compute, forward and backward, as the family's own code does over the dequantized weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_core import LoraConfig, add_lora, load_model, quantize_nf4
from qlora_core.errors import ModelWeightsInvalid, ShapeError
from qlora_core.nn.nf4_experts import NF4Stack
from tests.qlora_core.models.families import save_tiny, tiny_config

# With a gate, with interleaved and transposed gates and biases, without a gate.
FAMILIES = ("mixtral", "gpt_oss", "nemotron_h")
IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))


def load(folder: Path, **settings: Any) -> PreTrainedModel:
    return load_model(folder, device="cpu", compute_dtype=torch.float32, **settings)


def stacks(model: nn.Module) -> dict[str, NF4Stack]:
    return {path: one for path, one in model.named_modules() if isinstance(one, NF4Stack)}


def dense_layer(family: str, model: PreTrainedModel, path: str) -> Any:
    """The family's own module of experts, eager, over the dequantized weights of ``model``."""
    dense = AutoModelForCausalLM.from_config(tiny_config(family), experts_implementation="eager")
    layer: Any = dense.get_submodule(path)
    quantized = model.get_submodule(path)
    for name, parameter in layer.named_parameters():
        made = getattr(quantized, name)
        if isinstance(made, NF4Stack):
            made = torch.stack([made.nf4(i).dequantize() for i in range(len(made))])
            made = made.mT if layer.is_transposed else made
        parameter.data.copy_(made)
    return layer


@pytest.mark.parametrize("family", FAMILIES)
def test_results_and_gradients_are_those_of_the_dense_experts(tmp_path: Path, family: str) -> None:
    save_tiny(family, tmp_path)
    model = load(tmp_path)
    path = next(iter(stacks(model))).rpartition(".")[0]
    quantized, dense = model.get_submodule(path), dense_layer(family, model, path)
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(13)])
    weights = torch.rand(13, 2, generator=generator)
    results = []
    for layer in (quantized, dense):
        x = torch.randn(13, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        counted = weights.clone().requires_grad_()
        y = layer(x, index, counted)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, counted.grad))

    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_an_expert_that_no_token_chose_is_left_out(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path)
    model = load(tmp_path)
    layer = model.get_submodule("model.layers.0.mlp.experts")
    x, index = torch.randn(5, 64), torch.full((5, 1), 2)

    actual = layer(x, index, torch.ones(5, 1))

    expected = dense_layer("mixtral", model, "model.layers.0.mlp.experts")(
        x, index, torch.ones(5, 1)
    )
    torch.testing.assert_close(actual, expected)


def test_no_dense_weight_waits_for_the_backward_pass(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path)
    layer = load(tmp_path).get_submodule("model.layers.0.mlp.experts")
    kept: list[int] = []

    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        layer(torch.randn(3, 64).requires_grad_(), torch.tensor([[0], [1], [2]]), torch.ones(3, 1))

    assert kept
    assert max(kept) <= 3 * 256  # of activations; a dense weight has 64 x 256


def test_each_expert_is_quantized_for_itself(tmp_path: Path) -> None:
    save_tiny("gpt_oss", tmp_path)
    dense = load(tmp_path, quantize=False)

    model = load(tmp_path)

    for path, stack in stacks(model).items():
        for expert, weight in enumerate(dense.get_parameter(path)):
            expected = quantize_nf4(weight.T.contiguous())  # this family keeps it transposed
            assert torch.equal(stack.nf4(expert).packed, expected.packed)
            assert torch.equal(stack.nf4(expert).dequantize(), expected.dequantize())


def test_skipped_experts_stay_dense_beside_quantized_ones(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path)

    model = load(tmp_path, skip_modules=("lm_head", "layers.0.mlp.experts"))

    assert all(path.startswith("model.layers.1.") for path in stacks(model))
    assert isinstance(model.get_submodule("model.layers.0.mlp.experts").down_proj, nn.Parameter)
    expected = load(tmp_path, quantize=False)
    assert model(IDS).logits.isfinite().all()
    layer, own = (one.get_submodule("model.layers.0.mlp.experts") for one in (model, expected))
    x, index, weights = torch.randn(7, 64), torch.randint(0, 4, (7, 2)), torch.rand(7, 2)
    torch.testing.assert_close(layer(x, index, weights), own(x, index, weights))


def test_casting_a_model_leaves_scales_as_they_are(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path)
    model = load(tmp_path)
    before = {path: stack.nf4(1).dequantize() for path, stack in stacks(model).items()}

    model.bfloat16()

    for path, stack in stacks(model).items():
        assert torch.equal(stack.nf4(1).dequantize(), before[path])
        assert stack.packed.dtype == torch.uint8


def test_a_model_with_experts_is_trained_through_its_adapters(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path)
    model = load(tmp_path)
    adapted = add_lora(model, LoraConfig(r=4))

    loss = model(IDS, labels=IDS, use_cache=False).loss
    loss.backward()

    assert {path.rpartition(".")[2] for path in adapted} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    trained = [one for one in model.parameters() if one.requires_grad]
    assert len(trained) == 2 * len(adapted)
    assert all(one.grad is not None and one.grad.isfinite().all() for one in trained)


def test_an_expert_that_is_not_finite_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny("mixtral", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(key for key in tensors if "experts.2.w2" in key)
    tensors[name][3, 4] = torch.inf
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ModelWeightsInvalid, match=r"experts\.down_proj\[2\] holds NaN or infinity"):
        load(tmp_path)


def test_a_stack_takes_matrices_of_one_kind_only() -> None:
    one, other = quantize_nf4(torch.randn(4, 64)), quantize_nf4(torch.randn(5, 64))

    for weights in ([], [one, other], [quantize_nf4(torch.randn(64))]):
        with pytest.raises(ShapeError, match="matrices of one kind"):
            NF4Stack(weights, len(weights), compute_dtype=torch.float32)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_stack_takes_as_many_matrices_as_it_was_told(count: int) -> None:
    weights = [quantize_nf4(torch.randn(4, 64)) for _ in range(2)]

    with pytest.raises(ShapeError, match=f"needs {count} matrices"):
        NF4Stack(iter(weights), count, compute_dtype=torch.float32)


def test_says_its_size() -> None:
    stack = NF4Stack([quantize_nf4(torch.randn(4, 64))] * 3, 3, compute_dtype=torch.float32)

    assert "experts=3, in_features=64, out_features=4" in repr(stack)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_the_experts_are_those_of_the_cpu(tmp_path: Path, family: str) -> None:
    save_tiny(family, tmp_path)
    on_gpu = load_model(tmp_path, device="cuda", compute_dtype=torch.float32)
    on_cpu = load(tmp_path)

    for path, stack in stacks(on_gpu).items():
        assert torch.equal(stack.packed.cpu(), stacks(on_cpu)[path].packed)
    actual = on_gpu(IDS.cuda(), use_cache=False).logits.cpu()
    expected = on_cpu(IDS, use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)
