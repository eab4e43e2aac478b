"""FP4, int4 and int8: hand-derived values, bitsandbytes, and the surface they share with NF4Weight."""

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from qlora_core.errors import ConfigError, DtypeError, LayoutError, NonFiniteError, ShapeError
from qlora_core.quant.codebook import E2M1_LEVELS, FP4_LEVELS, thresholds_between
from qlora_core.quant.comparators import (
    ComparatorWeight,
    quantize_e2m1,
    quantize_fp4,
    quantize_int4,
    quantize_int8,
)

Quantize = Callable[..., ComparatorWeight]
ALL: list[Quantize] = [quantize_fp4, quantize_e2m1, quantize_int4, quantize_int8]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Half the widest distance of neighbouring levels.
GAPS = {quantize_fp4: 1 / 6, quantize_e2m1: 1 / 6, quantize_int4: 1 / 14, quantize_int8: 1 / 254}
all_formats = pytest.mark.parametrize("quantize", ALL, ids=lambda function: function.__name__)


def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(dtype)


def test_the_worked_example_of_int8() -> None:
    weight = torch.tensor([128.5, 256.0])

    quantized = quantize_int8(weight)

    # 127 / 256 * 128.5 = 63.75; 64 / 127 * 256 = 129.008
    assert quantized.codes.tolist() == [64, 127]
    assert quantized.absmax.tolist() == [256.0]
    assert quantized.dequantize().tolist() == pytest.approx([129.008, 256.0], abs=1e-3)


def test_the_worked_example_of_int4() -> None:
    quantized = quantize_int4(torch.tensor([7.0, -7.0, 2.4, -0.4]))

    # 7 / 7 * x rounded: 7, -7, 2, 0; a code is that plus 7, and the first of two is the high nibble.
    assert quantized.codes.tolist() == [0xE0, 0x97]
    assert quantized.dequantize().tolist() == pytest.approx([7, -7, 2, 0])


@pytest.mark.parametrize(("quantize", "largest"), [(quantize_int4, 7), (quantize_int8, 127)])
def test_the_integers_are_the_nearest(quantize: Quantize, largest: int) -> None:
    weight = matrix(5, 77)

    back = quantize(weight, block_size=32).dequantize()

    pairs = zip(weight.view(-1).split(32), back.view(-1).split(32), strict=True)
    for block, block_back in pairs:
        step = Fraction(float(block.abs().max())) / largest
        for x, y in zip(block.tolist(), block_back.tolist(), strict=True):
            nearest = round(Fraction(x) / step) * step
            assert y == pytest.approx(float(nearest), rel=1e-6)


def awkward(n: int) -> torch.Tensor:
    """Values on FP4's thresholds and one float32 beside them, zeros of both signs, and an outlier."""
    on = torch.tensor(thresholds_between(FP4_LEVELS))
    values = torch.cat([on, on.nextafter(torch.tensor(2.0)), on.nextafter(torch.tensor(-2.0))])
    values = torch.cat([values, torch.tensor([1.0, 0.0, -0.0, 1e-30, -1e-30])])
    block = torch.cat([values, torch.zeros(64 - len(values))])
    return block.repeat(-(-n // 64))[:n] * torch.linspace(1, 4, 4).repeat_interleave(n // 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 1024])
@pytest.mark.parametrize("make", [matrix, awkward])
def test_fp4_equals_bitsandbytes_bit_for_bit(
    make: Callable[[int], torch.Tensor], block_size: int, dtype: torch.dtype
) -> None:
    # Rows as long as the longest block: over shorter ones bitsandbytes' AVX-512 code goes wrong.
    weight = make(8192).view(8, 1024).to(dtype)

    quantized = quantize_fp4(weight, block_size=block_size)

    packed, state = quantize_4bit(weight, blocksize=block_size, quant_type="fp4")
    assert torch.equal(quantized.codes, packed.view(-1))
    assert torch.equal(quantized.absmax, state.absmax)
    for wanted in DTYPES:
        state.dtype = wanted
        assert torch.equal(quantized.dequantize(wanted), dequantize_4bit(packed, state))


@pytest.mark.parametrize(
    ("quantize", "levels"), [(quantize_fp4, FP4_LEVELS), (quantize_e2m1, E2M1_LEVELS)]
)
def test_levels_times_the_scale_come_back_exactly(
    quantize: Quantize, levels: tuple[float, ...]
) -> None:
    weight = torch.tensor(levels).repeat(4) * 0.375

    assert torch.equal(quantize(weight).dequantize(), weight)


def test_the_worked_example_of_e2m1() -> None:
    quantized = quantize_e2m1(torch.tensor([6.0, -3.4, 0.7, -0.2]))

    # The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 are 6 (0 111), -3 (1 101), 0.5 (0 001) and 0 (0 000).
    assert quantized.codes.tolist() == [0x7D, 0x10]
    assert quantized.dequantize().tolist() == pytest.approx([6, -3, 0.5, 0])


@all_formats
@pytest.mark.parametrize("shape", [(16, 64), (7, 13), (3, 5, 7), (1,)], ids=str)
def test_any_shape_and_dtype_comes_back_in_its_own(
    quantize: Quantize, shape: tuple[int, ...]
) -> None:
    for dtype in DTYPES:
        weight = matrix(*shape, dtype=dtype)

        back = quantize(weight).dequantize()

        assert back.shape == weight.shape
        assert back.dtype == dtype
        gap = GAPS[quantize]
        rounding = 2 * torch.finfo(dtype).eps
        assert (back - weight).abs().max() <= (gap + rounding) * weight.abs().max()


@all_formats
def test_memory_counts_codes_and_scales(quantize: Quantize) -> None:
    quantized = quantize(matrix(32, 64))

    bits = 8 if quantize is quantize_int8 else 4
    assert quantized.nbytes == 32 * 64 * bits // 8 + 32 * 4
    assert quantized.bits_per_parameter == bits + 0.5


@all_formats
def test_fills_the_memory_it_is_given(quantize: Quantize) -> None:
    quantized = quantize(matrix(9, 11))
    out = torch.full((9, 11), torch.nan)

    actual = quantized.dequantize(out=out)

    assert actual.data_ptr() == out.data_ptr()
    assert torch.equal(out, quantized.dequantize())


@all_formats
@pytest.mark.parametrize(
    "weight", [torch.zeros(100), torch.full((100,), 1e-45), torch.full((100,), -3e38)]
)
def test_zeros_and_the_ends_of_float32_come_back_finite(
    quantize: Quantize, weight: torch.Tensor
) -> None:
    back = quantize(weight).dequantize()

    assert back.isfinite().all()
    assert (back - weight).abs().max() <= weight.abs().max() * 1e-6 + 1e-37


@all_formats
def test_refuses_what_nf4_refuses(quantize: Quantize) -> None:
    with pytest.raises(DtypeError, match="w must be float16, bfloat16 or float32"):
        quantize(torch.ones(64, dtype=torch.float64), name="w")
    with pytest.raises(ConfigError, match=r"block_size must be one of 32, .* not 48"):
        quantize(torch.ones(64), block_size=48)
    with pytest.raises(ShapeError, match="no elements"):
        quantize(torch.ones(0))
    with pytest.raises(NonFiniteError, match="w holds NaN or infinity"):
        quantize(torch.tensor([1.0, torch.nan]), name="w")


@all_formats
def test_refuses_an_out_that_does_not_fit(quantize: Quantize) -> None:
    quantized = quantize(matrix(64))

    with pytest.raises(ShapeError, match="out has 63 elements"):
        quantized.dequantize(out=torch.empty(63))
    with pytest.raises(LayoutError, match="out must be contiguous"):
        quantized.dequantize(out=torch.empty(128)[::2])
    with pytest.raises(DtypeError, match=r"out must be torch\.float16"):
        quantized.dequantize(torch.float16, out=torch.empty(64))
    with pytest.raises(DtypeError, match="dtype must be float16"):
        quantized.dequantize(torch.float64)
