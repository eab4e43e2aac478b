"""Our weights in bitsandbytes' layout and theirs in our hands, held to bitsandbytes itself."""

import json
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from qlora_core import NF4Weight, quantize_nf4
from qlora_core.errors import ModelUnsupported, ModelWeightsInvalid
from qlora_core.quant.codebook import BLOCK_SIZES

NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"
# 20800 elements in blocks of 64 make two nested blocks, the second one short.
SHAPES = [(1,), (7, 13), (3, 5, 7), (32, 64), (160, 130)]


def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def tensors_of(**settings: Any) -> dict[str, Tensor]:
    return quantize_nf4(matrix(160, 130), **settings).to_bitsandbytes(NAME)


def tensors_bitsandbytes_writes(weight: Tensor, **settings: Any) -> dict[str, Tensor]:
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", **settings)
    return {NAME: packed, **{f"{NAME}.{key}": t for key, t in state.as_dict(packed=True).items()}}


def read_by_bitsandbytes(tensors: dict[str, Tensor]) -> bnb.QuantState:
    beside = {key: tensor for key, tensor in tensors.items() if key != NAME}
    return bnb.QuantState.from_dict(beside, device=torch.device("cpu"))


def values_of(packed: Tensor, state: Any) -> Tensor:
    """What a QuantState stands for, spelled out.

    `bitsandbytes.dequantize_4bit` is wrong on CPUs with AVX512 where a block reaches over several rows (0.50.2).
    """
    shape = torch.Size(state.shape)
    bytes_of = packed.view(torch.uint8).view(-1)
    codes = torch.stack([bytes_of >> 4, bytes_of & 15], dim=1).view(-1)[: shape.numel()]
    scales = state.absmax
    if state.nested:
        scales = bnb.dequantize_blockwise(scales, state.state2) + state.offset
    per_element = scales.repeat_interleave(state.blocksize)[: shape.numel()]
    return (state.code[codes.long()] * per_element).to(state.dtype).view(shape)


def with_state(tensors: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    state = json.loads(bytes(tensors[STATE].tolist()))
    text = bytearray(json.dumps({**state, **changes}), "utf-8")
    return {**tensors, STATE: torch.frombuffer(text, dtype=torch.uint8)}


def refusal(
    tensors: dict[str, Tensor], error: type[Exception] = ModelWeightsInvalid, *, names: str
) -> str:
    with pytest.raises(error) as told:
        NF4Weight.from_bitsandbytes(tensors, NAME)
    message = str(told.value)
    assert names in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_bitsandbytes_reads_what_we_write_as_the_same_weight(
    double_quant: bool, block_size: int
) -> None:
    for shape in SHAPES:
        weight = quantize_nf4(matrix(*shape), block_size=block_size, double_quant=double_quant)

        tensors = weight.to_bitsandbytes(NAME)

        state = read_by_bitsandbytes(tensors)
        assert torch.equal(values_of(tensors[NAME], state), weight.dequantize())
        assert state.shape == weight.shape
        assert state.nested is double_quant


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("nested", [False, True])
def test_we_read_what_bitsandbytes_writes_as_the_same_weight(
    nested: bool, block_size: int, dtype: torch.dtype
) -> None:
    for shape in SHAPES:
        tensors = tensors_bitsandbytes_writes(
            matrix(*shape, dtype=dtype), blocksize=block_size, compress_statistics=nested
        )

        weight = NF4Weight.from_bitsandbytes(tensors, NAME)

        theirs = values_of(tensors[NAME], read_by_bitsandbytes(tensors))
        assert torch.equal(weight.dequantize(), theirs)
        assert (weight.dtype, weight.block_size) == (dtype, block_size)
        assert weight.double_quant is nested


@pytest.mark.parametrize("nested", [False, True])
def test_keys_dtypes_and_the_text_are_those_of_bitsandbytes(nested: bool) -> None:
    dense = matrix(160, 130, dtype=torch.bfloat16)

    ours = quantize_nf4(dense, double_quant=nested).to_bitsandbytes(NAME)

    theirs = tensors_bitsandbytes_writes(dense, compress_statistics=nested)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (tensor.dtype, tensor.shape), key
        assert ours[key].is_contiguous()
    for key in theirs.keys() - {f"{NAME}.absmax"}:  # whose CPU code is not the nearest level's
        assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_weight_comes_back_to_the_bit(double_quant: bool) -> None:
    before = quantize_nf4(matrix(160, 130), block_size=128, double_quant=double_quant)

    after = NF4Weight.from_bitsandbytes(before.to_bitsandbytes(NAME), NAME)

    for field in ("packed", "absmax", "nested_absmax", "offset"):
        one, other = getattr(before, field), getattr(after, field)
        assert (one is None) == (other is None) == (field[0] in "no" and not double_quant)
        assert one is None or torch.equal(one, other)
    assert (after.shape, after.block_size, after.dtype) == ((160, 130), 128, torch.float32)
    assert after.packed.data_ptr() == before.packed.data_ptr()  # no copy on the way


@pytest.mark.parametrize(
    "storage",
    [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8],
    ids=str,
)
def test_codes_stored_as_another_dtype_are_the_same_codes(storage: torch.dtype) -> None:
    dense = matrix(32, 64)
    tensors = tensors_bitsandbytes_writes(dense, quant_storage=storage, compress_statistics=True)
    assert tensors[NAME].dtype == storage

    weight = NF4Weight.from_bitsandbytes(tensors, NAME)

    expected = tensors_bitsandbytes_writes(dense, compress_statistics=True)
    assert torch.equal(weight.packed, expected[NAME].view(-1))


def test_tensors_of_other_weights_may_stand_beside() -> None:
    other = NAME.replace("up", "down")
    tensors = {**tensors_of(), other: torch.ones(1), f"{other}.absmax": torch.ones(1)}

    assert NF4Weight.from_bitsandbytes(tensors, NAME).shape == (160, 130)


def test_moving_to_a_device_moves_every_tensor() -> None:
    moved = NF4Weight.from_bitsandbytes(tensors_of(), NAME).to("meta")

    for tensor in (moved.packed, moved.absmax, moved.nested_absmax, moved.offset):
        assert tensor is not None
        assert tensor.device.type == "meta"


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


def test_another_shape_of_as_many_elements_is_what_the_state_says() -> None:
    tensors = with_state(tensors_of(), shape=[130, 160])

    assert NF4Weight.from_bitsandbytes(tensors, NAME).shape == (130, 160)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_single_number_comes_back(double_quant: bool) -> None:
    before = quantize_nf4(torch.tensor(0.75), double_quant=double_quant)

    tensors = before.to_bitsandbytes(NAME)

    assert NF4Weight.from_bitsandbytes(tensors, NAME).shape == ()
    assert NF4Weight.from_bitsandbytes(tensors, NAME).dequantize() == 0.75
    assert values_of(tensors[NAME], read_by_bitsandbytes(tensors)) == 0.75


def test_a_shape_without_dimensions_has_one_element() -> None:
    refusal(with_state(tensors_of(), shape=[]), names="1 bytes for the shape []")


def test_an_offset_may_be_written_as_an_integer() -> None:
    tensors = with_state(tensors_of(), nested_offset=0)

    weight = NF4Weight.from_bitsandbytes(tensors, NAME)

    assert torch.equal(weight.dequantize(), values_of(tensors[NAME], read_by_bitsandbytes(tensors)))


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
