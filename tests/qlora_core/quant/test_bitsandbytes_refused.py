"""Tensors that are no weight in bitsandbytes' form are refused by the name of what is wrong."""

import pytest
import torch
from bitsandbytes import functional as bnb

from qlora_core import NF4Weight
from qlora_core.errors import ModelUnsupported, ModelWeightsInvalid
from tests.qlora_core.quant.bitsandbytes_tensors import (
    NAME,
    STATE,
    matrix,
    refusal,
    tensors_of,
    with_state,
)


@pytest.mark.parametrize(
    "suffix", ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"]
)
def test_a_missing_tensor_is_named(suffix: str) -> None:
    tensors = tensors_of()
    del tensors[NAME + suffix]

    assert refusal(tensors, names=NAME + suffix).endswith(f"lacks the tensor {NAME}{suffix}")


def test_a_missing_state_is_named() -> None:
    tensors = tensors_of()
    del tensors[STATE]

    refusal(tensors, names=STATE)


@pytest.mark.parametrize("suffix", [".SCB", ".weight_format", ".absmax.0"])
def test_a_tensor_that_does_not_belong_is_named(suffix: str) -> None:
    refusal({**tensors_of(), NAME + suffix: torch.ones(1)}, names=NAME + suffix)


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        ("", torch.int64),
        (".absmax", torch.float32),
        (".quant_map", torch.bfloat16),
        (".nested_absmax", torch.float16),
        (".nested_quant_map", torch.float64),
        (STATE.removeprefix(NAME), torch.int32),
    ],
)
def test_a_tensor_of_another_dtype_is_named(suffix: str, dtype: torch.dtype) -> None:
    tensors = tensors_of()
    tensors[NAME + suffix] = tensors[NAME + suffix].to(dtype)

    assert str(dtype) in refusal(tensors, names=NAME + suffix)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16], ids=str)
def test_scales_that_are_not_quantized_are_float32(dtype: torch.dtype) -> None:
    tensors = tensors_of(double_quant=False)
    tensors[f"{NAME}.absmax"] = tensors[f"{NAME}.absmax"].to(dtype)

    refusal(tensors, names=f"{NAME}.absmax is {dtype}")


@pytest.mark.parametrize(
    "suffix", ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"]
)
@pytest.mark.parametrize("change", ["short", "long", "empty"])
def test_a_tensor_of_another_length_is_named(suffix: str, change: str) -> None:
    tensors = tensors_of()
    flat = tensors[NAME + suffix].reshape(-1)
    tensors[NAME + suffix] = {
        "short": flat[:-1],
        "long": torch.cat([flat, flat[:1]]),
        "empty": flat[:0],
    }[change]

    assert "must hold" in refusal(tensors, names=NAME + suffix)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_scale_that_is_not_finite_is_named(double_quant: bool, bad: float) -> None:
    key = f"{NAME}.nested_absmax" if double_quant else f"{NAME}.absmax"
    tensors = tensors_of(double_quant=double_quant)
    tensors[key] = tensors[key].clone()
    tensors[key][1] = bad

    refusal(tensors, names=f"{key} holds NaN or infinity")


@pytest.mark.parametrize("suffix", [".quant_map", ".nested_quant_map"])
def test_levels_of_another_format_are_refused(suffix: str) -> None:
    tensors = tensors_of()
    tensors[NAME + suffix] = tensors[NAME + suffix] * 1.001

    refusal(tensors, ModelUnsupported, names=f"{NAME}{suffix} holds other levels")


def test_levels_may_differ_in_the_last_place() -> None:
    tensors = tensors_of()
    levels = tensors[f"{NAME}.nested_quant_map"]
    tensors[f"{NAME}.nested_quant_map"] = levels.nextafter(torch.ones(256))

    NF4Weight.from_bitsandbytes(tensors, NAME)


def test_fp4_is_refused_with_what_to_do() -> None:
    packed, state = bnb.quantize_4bit(matrix(8, 64), quant_type="fp4")
    beside = {f"{NAME}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}

    message = refusal({NAME: packed, **beside}, ModelUnsupported, names=NAME)

    assert "bnb_4bit_quant_type nf4" in message


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000], ids=lambda text: repr(text[:4])
)
def test_a_state_that_cannot_be_read_is_named(text: bytes) -> None:
    tensor = torch.tensor(list(text), dtype=torch.uint8)

    refusal({**tensors_of(), STATE: tensor}, names=STATE)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("quant_type", "fp4", ModelUnsupported),
        ("quant_type", None, ModelUnsupported),
        ("blocksize", 48, ModelUnsupported),
        ("blocksize", True, ModelUnsupported),
        ("blocksize", 64.0, ModelUnsupported),
        ("blocksize", 10**30, ModelUnsupported),
        ("dtype", "float64", ModelUnsupported),
        ("dtype", ["float32"], ModelUnsupported),
        ("shape", None, ModelWeightsInvalid),
        ("shape", [160, -130], ModelWeightsInvalid),
        ("shape", [160, "130"], ModelWeightsInvalid),
        ("shape", [10**40, 10**40], ModelWeightsInvalid),
        ("nested_blocksize", 128, ModelUnsupported),
        ("nested_dtype", "float16", ModelUnsupported),
        ("nested_offset", "0.1", ModelWeightsInvalid),
        ("nested_offset", float("nan"), ModelWeightsInvalid),
        ("nested_offset", 1e300, ModelWeightsInvalid),
        ("nested_offset", None, ModelWeightsInvalid),
        ("nested_offset", True, ModelWeightsInvalid),
        ("nested_offset", 10**400, ModelWeightsInvalid),
    ],
    ids=str,
)
def test_a_wrong_field_of_the_state_is_named(
    field: str, value: object, error: type[Exception]
) -> None:
    tensors = with_state(tensors_of(), **{field: value})

    assert field in refusal(tensors, error, names=STATE)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quant_type", "x" * 10**6),
        ("shape", [1] * 10**5 + [0]),
        ("shape", [[[[["x" * 99] * 99] * 9] * 9] * 9]),
        ("blocksize", 10**4000),
        ("dtype", {str(i): "x" for i in range(10**4)}),
        ("nested_dtype", "\n" * 10**6),
        ("nested_offset", "1" * 10**6),
    ],
    ids=["text", "list", "nested", "digits", "object", "lines", "number-in-text"],
)
def test_a_long_value_is_told_in_short(field: str, value: object) -> None:
    tensors = with_state(tensors_of(), **{field: value})

    with pytest.raises((ModelUnsupported, ModelWeightsInvalid), match=field) as told:
        NF4Weight.from_bitsandbytes(tensors, NAME)

    assert len(str(told.value)) < 300


@pytest.mark.parametrize(
    "suffix",
    ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE[len(NAME) :]],
)
def test_a_tensor_without_values_of_its_own_is_named(suffix: str) -> None:
    key = NAME + suffix
    tensors = tensors_of()

    for other in (tensors[key].to("meta"), tensors[key].to_sparse()):
        refusal({**tensors, key: other}, names=f"{key} holds no values that can be read")
