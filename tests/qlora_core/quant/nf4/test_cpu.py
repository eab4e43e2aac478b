"""The CPU path over several chunks and threads, against the reference, bit for bit."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qlora_core.errors import NonFiniteError
from qlora_core.quant.codebook import BLOCK_SIZES, NF4_THRESHOLDS
from qlora_core.quant.double_quant import reference as double_quant_reference
from qlora_core.quant.nf4 import ops, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Two chunks of 2^19, a shorter one that ends within a nested block, and a short last block.
SEVERAL_CHUNKS = 2 * 2**19 + 300 * 64 + 17


def weights(n: int, dtype: torch.dtype) -> Tensor:
    """Random values with a block of zeros, a block of subnormals, and one outlier."""
    values = torch.randn(n, generator=torch.Generator().manual_seed(n))
    values[64:128] = 0
    values[128:192] *= 1e-39
    values[n // 2] = 1000
    return values.to(dtype)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantizing_gives_the_same_with_any_number_of_threads(dtype: torch.dtype) -> None:
    values = weights(SEVERAL_CHUNKS, dtype)

    packed, absmax = ops.quantize_nf4(values)

    expected_packed, expected_absmax = reference.quantize_nf4(values, block_size=64)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(absmax, expected_absmax)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantizing_gives_the_same_with_any_number_of_threads(
    dtype: torch.dtype, nested: bool
) -> None:
    n = SEVERAL_CHUNKS
    packed, absmax = reference.quantize_nf4(weights(n, torch.float32), block_size=64)
    scales, nested_absmax, offset = absmax, None, None
    if nested:
        absmax, nested_absmax, offset = double_quant_reference.quantize_absmax(absmax)
        scales = double_quant_reference.dequantize_absmax(absmax, nested_absmax, offset)
    out = torch.full((n,), torch.nan, dtype=dtype)

    ops.dequantize_nf4(packed, absmax, nested_absmax, offset, n=n, dtype=dtype, out=out)

    expected = reference.dequantize_nf4(packed, scales, n=n, block_size=64, dtype=dtype)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("blocks", [1, 255, 256, 257])
@pytest.mark.parametrize("rest", [0, 1, 31])
def test_nested_scales_are_found_for_every_block_and_a_short_last_one(
    rest: int, blocks: int, block_size: int
) -> None:
    n = blocks * block_size + rest
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8)
    scales = torch.rand(-(-n // block_size)) + 0.5
    codes, nested_absmax, offset = double_quant_reference.quantize_absmax(scales)
    out = torch.full((n,), torch.nan)

    ops.dequantize_nf4(packed, codes, nested_absmax, offset, n=n, block_size=block_size, out=out)

    back = double_quant_reference.dequantize_absmax(codes, nested_absmax, offset)
    expected = reference.dequantize_nf4(
        packed, back, n=n, block_size=block_size, dtype=torch.float32
    )
    assert torch.equal(out, expected)


def test_a_matrix_in_which_every_value_is_near_a_threshold_is_quantized_exactly() -> None:
    on = torch.tensor(NF4_THRESHOLDS)
    above, below = (torch.nextafter(on, torch.tensor(way)) for way in (2.0, -2.0))
    block = torch.cat([torch.ones(1), on, above, below, on, torch.zeros(3)])
    scales = torch.logspace(-30, 30, 9000)
    values = (block * scales[:, None]).view(-1)

    packed, absmax = ops.quantize_nf4(values)

    expected_packed, expected_absmax = reference.quantize_nf4(values, block_size=64)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(absmax, expected_absmax)


@pytest.mark.parametrize("at", [0, 2**19 + 5, SEVERAL_CHUNKS - 1])
def test_a_value_that_is_not_finite_is_found_in_every_chunk(at: int) -> None:
    values = torch.ones(SEVERAL_CHUNKS)
    values[at] = torch.nan

    with pytest.raises(NonFiniteError, match="q_proj holds NaN or infinity"):
        ops.quantize_nf4(values, name="q_proj")
