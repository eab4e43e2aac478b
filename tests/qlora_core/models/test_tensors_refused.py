"""Tensors that are not the architecture's, or no weights, are refused by their names."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.qlora_core.models.refusals import edit_weights, refusal
from tests.tiny_models import save_tiny_llama

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "model")


@pytest.mark.parametrize("name", [WEIGHT, "model.norm.weight", "lm_head.weight"])
def test_a_tensor_that_is_not_there(folder: Path, name: str) -> None:
    edit_weights(folder, lambda tensors: tensors.__delitem__(name))

    error = refusal(folder)

    assert error.code == "model_weights_missing"
    assert f"lacks 1 tensors that the model needs ({name})" in error.message


def test_a_tensor_that_the_model_has_no_place_for(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update(extra=torch.ones(3)))

    error = refusal(folder)

    assert error.code == "model_weights_invalid"
    assert "(extra)" in error.message


def test_a_tensor_that_is_there_under_two_names(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"norm.weight": torch.ones(64)}))

    error = refusal(folder)

    assert error.code == "model_weights_invalid"
    assert "model.norm.weight" in error.message
    assert "only one of them" in error.message


@pytest.mark.parametrize("name", [WEIGHT, "model.norm.weight", "model.embed_tokens.weight"])
def test_a_tensor_of_another_shape(folder: Path, name: str) -> None:
    edit_weights(folder, lambda tensors: tensors.update({name: torch.ones(5, 7)}))

    error = refusal(folder)

    assert error.code == "model_weights_invalid"
    assert f"{name} is [5, 7] in the checkpoint" in error.message


def test_a_transposed_tensor_is_not_taken_for_the_right_one(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].T.contiguous()}))

    assert refusal(folder).code == "model_weights_invalid"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name", [WEIGHT, "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"]
)
def test_a_tensor_that_is_not_finite(folder: Path, name: str, bad: float) -> None:
    edit_weights(folder, lambda tensors: tensors[name].view(-1)[37].fill_(bad))

    error = refusal(folder)

    assert error.code == "model_weights_invalid"
    assert f"{name} holds NaN or infinity" in error.message


@pytest.mark.parametrize("settings", [{"quantize": False}, {"skip_modules": ("up_proj",)}], ids=str)
def test_a_linear_layer_that_stays_dense_and_is_not_finite(
    folder: Path, settings: dict[str, Any]
) -> None:
    edit_weights(folder, lambda tensors: tensors[WEIGHT][3].fill_(torch.nan))

    error = refusal(folder, **settings)

    assert error.code == "model_weights_invalid"
    assert f"{WEIGHT} holds NaN or infinity" in error.message


@pytest.mark.parametrize(
    ("compute_dtype", "value"), [(torch.float16, 66_000.0), (torch.bfloat16, 3.4e38)], ids=str
)
@pytest.mark.parametrize("name", [WEIGHT, "model.norm.weight"])
def test_a_tensor_that_the_compute_dtype_cannot_hold(
    folder: Path, name: str, compute_dtype: torch.dtype, value: float
) -> None:
    edit_weights(folder, lambda tensors: tensors[name].view(-1)[37].fill_(value))

    error = refusal(folder, compute_dtype=compute_dtype)

    assert error.code == "model_weights_invalid"
    assert f"{name} holds numbers that are too large for {compute_dtype}" in error.message


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_tensor_of_a_dtype_that_is_no_weights(folder: Path, dtype: torch.dtype) -> None:
    edit_weights(folder, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].to(dtype)}))

    error = refusal(folder)

    assert error.code == "model_unsupported"
    assert f"{WEIGHT} is {dtype}" in error.message


LONG = "x" * 100_000


@pytest.mark.parametrize("name", [LONG, "two\nlines", "\x1b[31mred", ""], ids=lambda name: name[:9])
def test_a_tensors_name_that_no_message_can_show(folder: Path, name: str) -> None:
    edit_weights(folder, lambda tensors: tensors.update({name: torch.ones(3)}))

    error = refusal(folder)

    assert error.code == "model_weights_invalid"
    assert "\x1b" not in error.message
