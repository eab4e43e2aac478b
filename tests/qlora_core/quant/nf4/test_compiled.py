"""The two ways of dequantizing whole blocks on a CPU, compiled and by tables, against the reference, bit for bit."""

import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from qlora_core import quantize_nf4
from qlora_core.quant.codebook import BLOCK_SIZES
from qlora_core.quant.double_quant import reference as double_quant_reference
from qlora_core.quant.nf4 import compiled, cpu, reference

Fill = Callable[..., bool | None]
CAN_COMPILE = find_spec("llvmlite") is not None and platform.machine() in ("x86_64", "AMD64")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=[compiled.fill, cpu.fill_by_tables], ids=["compiled", "by tables"])
def fill(request: pytest.FixtureRequest) -> Fill:
    if request.param is compiled.fill and not CAN_COMPILE:
        pytest.skip("compiled code needs llvmlite and an x86 CPU")
    return request.param


def codes_and_scales(blocks: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Every byte there is, in random order, under scales of every size."""
    generator = torch.Generator().manual_seed(blocks)
    n = blocks * block_size // 2
    packed = torch.arange(n).remainder(256)[torch.randperm(n, generator=generator)]
    exponents = torch.linspace(-44, 38, blocks)[torch.randperm(blocks, generator=generator)]
    return packed.to(torch.uint8), 3 * 10**exponents


def expected_of(packed: Tensor, scales: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    n = 2 * packed.numel()
    return reference.dequantize_nf4(packed, scales, n=n, block_size=block_size, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("blocks", [1, 83])
def test_scales_in_float32(blocks: int, block_size: int, dtype: torch.dtype, fill: Fill) -> None:
    packed, absmax = codes_and_scales(blocks, block_size)
    out = torch.full((2 * packed.numel(),), torch.nan, dtype=dtype)

    fill(packed, absmax, None, None, out, block_size=block_size)

    assert torch.equal(out, expected_of(packed, absmax, block_size, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("blocks", [1, 256, 601])
def test_doubly_quantized_scales(
    blocks: int, block_size: int, dtype: torch.dtype, fill: Fill
) -> None:
    packed, _ = codes_and_scales(blocks, block_size)
    absmax = torch.rand(blocks, generator=torch.Generator().manual_seed(blocks)) * 1e-3
    codes, nested_absmax, offset = double_quant_reference.quantize_absmax(absmax)
    out = torch.full((2 * packed.numel(),), torch.nan, dtype=dtype)

    fill(packed, codes, nested_absmax, offset, out, block_size=block_size)

    scales = double_quant_reference.dequantize_absmax(codes, nested_absmax, offset)
    assert torch.equal(out, expected_of(packed, scales, block_size, dtype))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block_size", [32, 4096])
def test_more_than_one_part_for_each_thread(block_size: int, nested: bool, fill: Fill) -> None:
    blocks = 2 * 1024 * 1024 // block_size + 300
    packed, absmax = codes_and_scales(blocks, block_size)
    nested_absmax = offset = None
    scales = absmax
    if nested:
        absmax, nested_absmax, offset = double_quant_reference.quantize_absmax(
            torch.linspace(0.1, 0.5, blocks)
        )
        scales = double_quant_reference.dequantize_absmax(absmax, nested_absmax, offset)
    out = torch.full((2 * packed.numel(),), torch.nan, dtype=torch.bfloat16)

    fill(packed, absmax, nested_absmax, offset, out, block_size=block_size)

    assert torch.equal(out, expected_of(packed, scales, block_size, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_that_are_not_finite_or_negative(dtype: torch.dtype, fill: Fill) -> None:
    packed = torch.arange(256, dtype=torch.uint8).repeat(5)
    absmax = torch.tensor([torch.inf, torch.nan, -2.5, -0.0, 3e38]).repeat_interleave(2)
    absmax[3:4].view(torch.int32).fill_(0x7FFFFFFF)  # the NaN that rounding by integers would spoil
    out = torch.zeros(2560, dtype=dtype)

    fill(packed, absmax, None, None, out, block_size=256)

    torch.testing.assert_close(
        out, expected_of(packed, absmax, 256, dtype), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_that_begins_anywhere_and_nothing_beside_it(dtype: torch.dtype, fill: Fill) -> None:
    packed, absmax = codes_and_scales(7, 64)
    memory = torch.full((7 * 64 + 2,), torch.nan, dtype=dtype)
    odd_packed = torch.empty(7 * 32 + 1, dtype=torch.uint8)[1:].copy_(packed)

    fill(odd_packed, absmax, None, None, memory[1:-1], block_size=64)

    assert torch.equal(memory[1:-1], expected_of(packed, absmax, 64, dtype))
    assert memory[[0, -1]].isnan().all()


def test_autograd_sees_that_a_tensor_was_written(fill: Fill) -> None:
    packed, absmax = codes_and_scales(3, 64)
    out = torch.ones(192)
    product = (out * torch.ones(192, requires_grad=True)).sum()

    fill(packed, absmax, None, None, out, block_size=64)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_nothing_needs_llvmlite() -> None:
    script = (
        "import sys; sys.modules['llvmlite'] = None\n"
        "import torch\n"
        "from qlora_core import quantize_nf4\n"
        "from qlora_core.quant.nf4 import compiled\n"
        "assert quantize_nf4(torch.ones(4, 64)).dequantize().eq(1).all()\n"
        "assert compiled._function(torch.float32, nested=True) is None\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not CAN_COMPILE, reason="compiled code needs llvmlite and an x86 CPU")
def test_a_weight_is_dequantized_by_compiled_code_where_it_can_be() -> None:
    weight = quantize_nf4(torch.ones(2, 64))

    assert compiled.fill(
        weight.packed,
        weight.absmax,
        weight.nested_absmax,
        weight.offset,
        torch.empty(128),
        block_size=64,
    )
