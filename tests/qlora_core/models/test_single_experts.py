"""A mixture that is stored expert by expert is made whole, or refused by the tensor that does not fit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_core import ModelError, load_model, quantize_nf4
from qlora_core.nn.nf4_experts import NF4Stack
from tests.qlora_core.models.families import save_tiny

Tensors = dict[str, Tensor]
EXPERT = "model.layers.0.block_sparse_moe.experts.{}.w{}.weight"
FUSED = "model.layers.0.mlp.experts.down_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny("mixtral", tmp_path)
    return tmp_path


def load(folder: Path, *, quantize: bool = True) -> PreTrainedModel:
    return load_model(folder, device="cpu", compute_dtype=torch.float32, quantize=quantize)


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder: Path, change: Callable[[Tensors], object]) -> ModelError:
    edit(folder, change)
    with pytest.raises(ModelError) as told:
        load(folder)
    return told.value


def test_each_expert_is_that_of_transformers_quantized(folder: Path) -> None:
    model = load(folder)

    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stacks = [path for path, one in model.named_modules() if isinstance(one, NF4Stack)]
    assert len(stacks) == 4
    for path in stacks:
        for i, weight in enumerate(expected.get_parameter(path)):
            actual = model.get_submodule(path)
            assert isinstance(actual, NF4Stack)
            assert torch.equal(actual.nf4(i).packed, quantize_nf4(weight.detach()).packed)


def test_experts_of_mixed_dtypes_are_made_as_transformers_does(folder: Path) -> None:
    name = EXPERT.format(2, 1)
    edit(folder, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))

    model = load(folder, quantize=False)

    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for path, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(path), parameter)


def test_experts_that_are_dense_are_parameters(folder: Path) -> None:
    assert isinstance(load(folder, quantize=False).get_parameter(FUSED), nn.Parameter)


def test_a_tensor_that_one_expert_lacks_is_named(folder: Path) -> None:
    error = refusal(folder, lambda tensors: tensors.pop(EXPERT.format(2, 1)))

    assert error.code == "model_weights_missing"
    assert "lacks w1.weight of expert 2 in model.layers.0.mlp.experts.gate_up_proj" in error.message


def test_a_tensor_that_all_experts_lack_is_named(folder: Path) -> None:
    error = refusal(folder, lambda tensors: [tensors.pop(EXPERT.format(i, 3)) for i in range(4)])

    assert error.code == "model_weights_missing"
    assert "lacks w3.weight of expert 0" in error.message


def test_tensors_of_different_experts_are_not_joined(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        del tensors[EXPERT.format(1, 1)], tensors[EXPERT.format(2, 3)]

    error = refusal(folder, change)

    assert error.code == "model_weights_missing"
    assert "of expert 1 in" in error.message


def test_experts_with_a_gap_in_their_numbers_are_refused(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        for i in (1, 2, 3):
            tensors[EXPERT.format(9, i)] = tensors.pop(EXPERT.format(3, i))

    error = refusal(folder, change)

    assert error.code == "model_weights_missing"
    assert "of expert 3 in" in error.message


@pytest.mark.parametrize("unnumbered", [[1], [1, 3]])
def test_an_expert_without_a_number_is_named(folder: Path, unnumbered: list[int]) -> None:
    def change(tensors: Tensors) -> None:
        for i in unnumbered:
            tensors[EXPERT.format("x", i)] = tensors.pop(EXPERT.format(1, i))

    error = refusal(folder, change)

    assert error.code == "model_weights_invalid"
    assert f"{EXPERT.format('x', 1)} has no expert's number" in error.message


@pytest.mark.parametrize("other", ["{}", "0{}"])
def test_an_expert_that_is_there_twice_is_named(folder: Path, other: str) -> None:
    name = EXPERT.format(1, 1)
    again = EXPERT.format(other.format(1), 1)
    again = again.removeprefix("model.") if again == name else again

    error = refusal(folder, lambda tensors: tensors.update({again: tensors[name].clone()}))

    assert error.code == "model_weights_invalid"
    assert name in error.message
    assert again in error.message
    assert "are both w1.weight of expert 1 in model.layers.0.mlp" in error.message


def test_rows_that_only_add_up_to_the_right_number_are_refused(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        for i in range(4):
            up, gate = EXPERT.format(i, 3), EXPERT.format(i, 1)
            tensors[gate] = torch.cat([tensors[gate], tensors[up][:3]])
            tensors[up] = tensors[up][3:].clone()

    error = refusal(folder, change)

    assert error.code == "model_weights_invalid"
    assert f"{EXPERT.format(0, 3)} is [" in error.message


@pytest.mark.parametrize("count", [3, 5])
def test_more_or_fewer_experts_than_configured_are_refused(folder: Path, count: int) -> None:
    def change(tensors: Tensors) -> None:
        for i in (1, 2, 3):
            tensors[EXPERT.format(4, i)] = tensors[EXPERT.format(3, i)].clone()
            for expert in range(count, 5):
                del tensors[EXPERT.format(expert, i)]

    error = refusal(folder, change)

    assert error.code == "model_weights_invalid"
    assert f"is [{count}, " in error.message


@pytest.mark.parametrize("shape", [(5, 7), (7,), (), (0, 64)], ids=str)
def test_an_expert_of_another_shape_is_named(folder: Path, shape: tuple[int, ...]) -> None:
    name = EXPERT.format(2, 1)

    error = refusal(folder, lambda tensors: tensors.update({name: torch.ones(shape)}))

    assert error.code == "model_weights_invalid"
    assert f"{name} is {list(shape)} in the checkpoint" in error.message


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64], ids=str)
def test_experts_of_a_dtype_that_is_no_weights_are_refused(
    folder: Path, dtype: torch.dtype
) -> None:
    def change(tensors: Tensors) -> None:
        names = [EXPERT.format(i, 2) for i in range(4)]
        tensors.update({name: tensors[name].to(dtype) for name in names})

    error = refusal(folder, change)

    assert error.code == "model_unsupported"
    assert f"is {dtype} in the checkpoint" in error.message


def test_a_fused_stack_beside_the_single_experts_is_refused(folder: Path) -> None:
    error = refusal(folder, lambda tensors: tensors.update({FUSED: torch.ones(4, 64, 128)}))

    assert error.code == "model_weights_invalid"
    assert f"{FUSED} and " in error.message
    assert "only one of them" in error.message
