"""Our weights in bitsandbytes' layout and theirs in our hands, held to bitsandbytes itself."""

from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from qlora_core import NF4Weight, quantize_nf4
from qlora_core.quant.codebook import BLOCK_SIZES
from tests.qlora_core.quant.bitsandbytes_tensors import (
    NAME,
    matrix,
    refusal,
    tensors_of,
    with_state,
)

# 20800 elements in blocks of 64 make two nested blocks, the second one short.
SHAPES = [(1,), (7, 13), (3, 5, 7), (32, 64), (160, 130)]


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
