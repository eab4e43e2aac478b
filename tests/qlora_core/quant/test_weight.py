"""NF4Weight: the quantized weight as the rest of the engine sees it."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from qlora_core import NF4Weight, NonFiniteError, quantize_nf4
from qlora_core.errors import ConfigError, DtypeError, LayoutError
from qlora_core.quant import comparators
from qlora_core.quant.double_quant import reference as double_quant_reference
from qlora_core.quant.nf4 import reference as nf4_reference
from qlora_core.quant.workspace import dense


def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(16, 64), (7, 13), (3, 5, 7), (1,)], ids=str)
def test_comes_back_as_the_references_say(shape: tuple[int, ...], double_quant: bool) -> None:
    weight = matrix(*shape, dtype=torch.bfloat16)

    quantized = quantize_nf4(weight, double_quant=double_quant)

    packed, scales = nf4_reference.quantize_nf4(weight, block_size=64)
    if double_quant:
        scales = double_quant_reference.dequantize_absmax(
            *double_quant_reference.quantize_absmax(scales)
        )
    expected = nf4_reference.dequantize_nf4(
        packed, scales, n=weight.numel(), block_size=64, dtype=torch.bfloat16
    )
    assert torch.equal(quantized.dequantize(), expected.view(shape))
    assert quantized.dequantize().dtype == torch.bfloat16
    assert quantized.shape == shape
    assert quantized.double_quant is double_quant


def test_double_quantization_costs_4127_thousandths_of_a_bit_per_parameter() -> None:
    weight = matrix(512, 512)

    plain, double = quantize_nf4(weight, double_quant=False), quantize_nf4(weight)

    assert plain.bits_per_parameter == 4.5
    assert round(double.bits_per_parameter, 3) == 4.127
    assert double.nbytes == 512 * 512 // 2 + 4096 + 16 * 4 + 4


def test_fills_the_memory_it_is_given_and_no_other() -> None:
    quantized = quantize_nf4(matrix(10, 10))
    out = torch.full((10, 10), torch.nan)

    actual = quantized.dequantize(out=out)

    assert actual.data_ptr() == out.data_ptr()
    assert torch.equal(out, quantized.dequantize(torch.float32))


def test_zeros_stay_zeros_through_double_quantization() -> None:
    weight = matrix(64, 64)
    weight[3:9] = 0

    back = quantize_nf4(weight).dequantize()

    assert back[3:9].eq(0).all()


def test_names_the_tensor_that_is_not_finite() -> None:
    weight = matrix(4, 64)
    weight[2, 5] = torch.inf

    with pytest.raises(NonFiniteError, match=r"model\.q_proj\.weight"):
        quantize_nf4(weight, name="model.q_proj.weight")


def test_a_weight_that_is_not_contiguous_is_quantized_in_the_order_of_its_rows() -> None:
    weight = matrix(32, 48)

    assert torch.equal(
        quantize_nf4(weight.T).dequantize(), quantize_nf4(weight.T.contiguous()).dequantize()
    )


@pytest.mark.gpu
def test_moves_to_another_device_with_all_its_parts() -> None:
    moved = quantize_nf4(matrix(8, 64)).to("cuda")

    parts = (moved.packed, moved.absmax, moved.nested_absmax, moved.offset)
    assert [part is not None and part.device.type for part in parts] == ["cuda"] * 4
    assert moved.device.type == "cuda"


def test_a_weight_that_is_there_already_moves_nowhere() -> None:
    weight = quantize_nf4(matrix(8, 64))

    assert weight.to("cpu") is weight
    assert weight.to(torch.device("cpu")) is weight


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", torch.device("cuda")], ids=repr)
def test_a_device_that_is_not_there_is_named(device: torch.device | str) -> None:
    with pytest.raises(ConfigError, match=r"there is no device cuda(:7)? here"):
        quantize_nf4(matrix(8, 64)).to(device)


def test_what_is_no_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="'gpu0' is no device"):
        quantize_nf4(matrix(8, 64)).to("gpu0")


@pytest.mark.parametrize("quantize", [quantize_nf4, comparators.quantize_int8])
def test_a_tensor_without_values_of_its_own_is_refused_by_name(
    quantize: Callable[..., object],
) -> None:
    with pytest.raises(LayoutError, match="q_proj is on meta"):
        quantize(matrix(8, 64).to("meta"), name="q_proj")
    with pytest.raises(LayoutError, match="q_proj must be dense, not sparse_coo"):
        quantize(matrix(8, 64).to_sparse(), name="q_proj")


def test_codes_on_the_meta_device_cannot_be_dequantized() -> None:
    weight = quantize_nf4(matrix(8, 64))
    names = ("packed", "absmax", "nested_absmax", "offset")
    weight = replace(weight, **{name: getattr(weight, name).to("meta") for name in names})

    with pytest.raises(LayoutError, match="packed is on meta"):
        weight.dequantize()
    with pytest.raises(LayoutError, match="codes is on meta"):
        weight.scales()


def test_an_out_that_is_sparse_is_refused() -> None:
    with pytest.raises(LayoutError, match="out must be dense, not sparse_coo"):
        quantize_nf4(matrix(8, 64)).dequantize(out=matrix(8, 64).to_sparse())


@pytest.mark.parametrize("block_size", [64.0, True, "64", None, torch.tensor(64)], ids=repr)
def test_a_block_size_is_an_integer(block_size: object) -> None:
    with pytest.raises(ConfigError, match="block_size must be one of 32, 64"):
        quantize_nf4(matrix(8, 64), block_size=block_size)  # pyright: ignore[reportArgumentType]


def test_the_workspace_lends_two_weights_at_once_different_memory() -> None:
    first, second = quantize_nf4(matrix(8, 64)), quantize_nf4(-matrix(8, 64))

    with dense(first, torch.float32) as one, dense(second, torch.float32) as other:
        assert one.data_ptr() != other.data_ptr()
        assert torch.equal(one, first.dequantize())
        assert torch.equal(other, second.dequantize())


def test_the_workspace_reuses_its_memory() -> None:
    weight = quantize_nf4(matrix(8, 64))

    with dense(weight, torch.float32) as lent:
        first = lent.data_ptr()
    with dense(weight, torch.float32) as lent:
        second = lent.data_ptr()

    assert first == second


def test_a_dense_weight_is_lent_as_it_is() -> None:
    weight = matrix(8, 64)

    with dense(weight, torch.float32) as lent:
        assert lent.data_ptr() == weight.data_ptr()
    with dense(weight, torch.bfloat16) as lent:
        assert torch.equal(lent, weight.to(torch.bfloat16))


def test_memory_lent_in_inference_mode_can_be_written_outside_it() -> None:
    weight: NF4Weight = quantize_nf4(matrix(300, 300))

    with torch.inference_mode(), dense(weight, torch.float32) as inside:
        expected = inside.clone()
    with dense(weight, torch.float32) as outside:
        assert torch.equal(outside, expected)


def test_nothing_here_needs_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, qlora_core.quant, qlora_core.nn\n"
        "weight = qlora_core.quant.quantize_nf4(torch.ones(4, 64))\n"
        "assert weight.dequantize().eq(1).all()\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stderr


def test_what_is_no_tensor_is_refused() -> None:
    values: Any = [1.0, 2.0]

    with pytest.raises(DtypeError, match="up_proj must be a tensor, not list"):
        quantize_nf4(values, name="up_proj")
    with pytest.raises(DtypeError, match="out must be a tensor, not list"):
        quantize_nf4(torch.ones(2)).dequantize(out=values)


def test_meta_is_no_device_to_move_to() -> None:
    with pytest.raises(ConfigError, match="meta"):
        quantize_nf4(torch.ones(2)).to("meta")
