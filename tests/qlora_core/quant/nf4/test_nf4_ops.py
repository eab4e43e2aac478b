"""The CPU path for NF4 against the reference, bit for bit; and the checks of all paths."""

import pytest
import torch
from torch import Tensor

from qlora_core.errors import ConfigError, DtypeError, LayoutError, NonFiniteError, ShapeError
from qlora_core.quant.codebook import BLOCK_SIZES, NF4_THRESHOLDS
from qlora_core.quant.nf4 import ops, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One element; a short block; whole blocks; odd and ending in the middle of a block and of a tile.
SIZES = [1, 31, 64, 1000, 8195]


def weights(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random values with a block of zeros, a block of subnormals, and one outlier."""
    values = torch.randn(n, generator=torch.Generator().manual_seed(n))
    values[64:128] = 0
    values[128:192] *= 1e-39
    values[n // 2] = 1000
    return values.to(dtype)


def with_scales(n: int, block_size: int) -> tuple[Tensor, Tensor]:
    return reference.quantize_nf4(weights(n), block_size=block_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("n", SIZES)
def test_quantizing_on_the_cpu_equals_the_reference(
    n: int, block_size: int, dtype: torch.dtype
) -> None:
    values = weights(n, dtype)

    packed, absmax = ops.quantize_nf4(values, block_size=block_size)

    expected_packed, expected_absmax = reference.quantize_nf4(values, block_size=block_size)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(absmax, expected_absmax)


def test_quantizing_on_the_cpu_equals_the_reference_on_and_around_every_threshold() -> None:
    on = torch.tensor(NF4_THRESHOLDS)
    values = torch.cat(
        [on, torch.nextafter(on, torch.tensor(2.0)), torch.nextafter(on, torch.tensor(-2.0))]
    )
    values = torch.cat([torch.ones(1), values, torch.zeros(18)])  # one whole block of 64

    packed, _ = ops.quantize_nf4(values, block_size=64)

    assert torch.equal(packed, reference.quantize_nf4(values, block_size=64)[0])


def test_quantizing_more_than_one_chunk_on_the_cpu_equals_the_reference() -> None:
    values = weights(600_001)

    packed, absmax = ops.quantize_nf4(values, block_size=64)

    # The reference takes 16 times the memory; thresholds by search give the same codes.
    inverse = (1 / absmax).clamp(max=torch.finfo(torch.float32).max)
    scaled = values * inverse.repeat_interleave(64)[:600_001]
    codes = torch.bucketize(scaled, torch.tensor(NF4_THRESHOLDS), right=False)
    assert torch.equal(reference.unpack_codes(packed, 600_001).long(), codes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("n", SIZES)
def test_dequantizing_on_the_cpu_equals_the_reference(
    n: int, block_size: int, dtype: torch.dtype
) -> None:
    packed, absmax = with_scales(n, block_size)
    out = torch.full((n,), torch.nan, dtype=dtype)

    actual = ops.dequantize_nf4(packed, absmax, n=n, block_size=block_size, dtype=dtype, out=out)

    expected = reference.dequantize_nf4(packed, absmax, n=n, block_size=block_size, dtype=dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert actual.data_ptr() == out.data_ptr()


def test_dequantizing_into_memory_that_is_not_8_byte_aligned_equals_the_reference() -> None:
    packed, absmax = with_scales(1000, 64)
    memory = torch.full((1001,), torch.nan)

    ops.dequantize_nf4(packed, absmax, n=1000, dtype=torch.float32, out=memory[1:])

    expected = reference.dequantize_nf4(packed, absmax, n=1000, block_size=64, dtype=torch.float32)
    assert torch.equal(memory[1:], expected)
    assert memory[0].isnan()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 70, 129])
def test_a_tensor_that_is_not_finite_is_refused_by_name(at: int, bad: float) -> None:
    values = torch.ones(130)
    values[at] = bad

    with pytest.raises(NonFiniteError, match=r"layers\.3\.weight holds NaN or infinity"):
        ops.quantize_nf4(values, name="layers.3.weight")


def test_quantizing_refuses_what_the_format_does_not_have() -> None:
    with pytest.raises(DtypeError, match="float64"):
        ops.quantize_nf4(torch.ones(64, dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"block_size must be one of 32, .* not 48"):
        ops.quantize_nf4(torch.ones(64), block_size=48)
    with pytest.raises(ShapeError, match="no elements"):
        ops.quantize_nf4(torch.ones(0))


def test_dequantizing_refuses_tensors_that_do_not_belong_together() -> None:
    packed, absmax = torch.zeros(32, dtype=torch.uint8), torch.ones(1)

    with pytest.raises(ShapeError, match="66 codes need 33 bytes, but packed has 32"):
        ops.dequantize_nf4(packed, absmax, n=66)
    with pytest.raises(ShapeError, match="but 2 scales"):
        ops.dequantize_nf4(packed, torch.ones(2), n=64)
    with pytest.raises(DtypeError, match=r"absmax must be torch\.float32"):
        ops.dequantize_nf4(packed, absmax.half(), n=64)
    with pytest.raises(DtypeError, match=r"packed must be torch\.uint8"):
        ops.dequantize_nf4(packed.int(), absmax, n=64)
    with pytest.raises(DtypeError, match="dtype must be float16"):
        ops.dequantize_nf4(packed, absmax, n=64, dtype=torch.float64)
    with pytest.raises(LayoutError, match="packed must be contiguous"):
        ops.dequantize_nf4(torch.zeros(64, dtype=torch.uint8)[::2], absmax, n=64)
    with pytest.raises(LayoutError, match="absmax is on meta, but packed is on cpu"):
        ops.dequantize_nf4(packed, absmax.to("meta"), n=64)


def test_dequantizing_refuses_an_out_that_does_not_fit() -> None:
    packed, absmax = torch.zeros(32, dtype=torch.uint8), torch.ones(1)

    with pytest.raises(ShapeError, match="out has 63 elements"):
        ops.dequantize_nf4(packed, absmax, n=64, out=torch.empty(63))
    with pytest.raises(DtypeError, match=r"out must be torch\.float32"):
        ops.dequantize_nf4(packed, absmax, n=64, out=torch.empty(64, dtype=torch.float16))
    with pytest.raises(LayoutError, match="out must be contiguous"):
        ops.dequantize_nf4(packed, absmax, n=64, out=torch.empty(128)[::2])
    with pytest.raises(LayoutError, match="gradient"):
        ops.dequantize_nf4(packed, absmax, n=64, out=torch.empty(64, requires_grad=True))
