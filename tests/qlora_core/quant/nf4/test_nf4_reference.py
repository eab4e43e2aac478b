"""The NF4 specification against hand-derived values and an independent brute-force implementation."""

import pytest
import torch

from qlora_core.quant.codebook import NF4_LEVELS, NF4_THRESHOLDS
from qlora_core.quant.nf4 import reference
from tests.qlora_core.quant import brute_force

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def test_the_even_element_is_in_the_high_nibble() -> None:
    # absmax 2: scaled values 1 (level 15), -1 (level 0), 0 (level 7) and 0.5 (nearest 0.4407, 12).
    values = torch.tensor([2.0, -2.0, 0.0, 1.0])

    packed, absmax = reference.quantize_nf4(values, block_size=32)

    assert packed.tolist() == [0xF0, 0x7C]
    assert absmax.tolist() == [2.0]


def test_a_missing_last_odd_element_counts_as_zero() -> None:
    packed, _ = reference.quantize_nf4(torch.tensor([-3.0]), block_size=32)

    assert packed.tolist() == [0x07]


def test_a_value_on_a_threshold_gets_the_lower_level_and_just_above_it_the_higher() -> None:
    on = torch.tensor([1.0, *NF4_THRESHOLDS])
    above = torch.nextafter(on, torch.tensor(2.0)).clamp(max=1.0)

    codes_on = reference.unpack_codes(reference.quantize_nf4(on, block_size=32)[0], 16)
    codes_above = reference.unpack_codes(reference.quantize_nf4(above, block_size=32)[0], 16)

    assert codes_on.tolist() == [15, *range(15)]
    assert codes_above.tolist() == [15, *range(1, 16)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 31, 64, 77, 201])
def test_equals_an_independent_implementation(n: int, dtype: torch.dtype) -> None:
    values = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)

    packed, absmax = reference.quantize_nf4(values, block_size=32)

    codes, scales = brute_force.quantize(values.float().tolist(), 32)
    assert packed.tolist() == brute_force.pack(codes)
    assert absmax.tolist() == scales


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_of_zeros_comes_back_as_exact_zeros(dtype: torch.dtype) -> None:
    values = torch.cat([torch.ones(64), torch.zeros(64), torch.full((10,), -0.0)]).to(dtype)

    packed, absmax = reference.quantize_nf4(values, block_size=64)
    back = reference.dequantize_nf4(packed, absmax, n=138, block_size=64, dtype=dtype)

    assert reference.unpack_codes(packed, 138)[64:].tolist() == [7] * 74
    assert absmax.tolist() == [1.0, 0.0, 0.0]
    assert back[64:].eq(0).all()


def test_levels_times_the_scale_come_back_exactly() -> None:
    values = torch.tensor(NF4_LEVELS).repeat(4) * 0.375  # a power of two apart: exact products

    packed, absmax = reference.quantize_nf4(values, block_size=64)

    back = reference.dequantize_nf4(packed, absmax, n=64, block_size=64, dtype=torch.float32)
    torch.testing.assert_close(back, values, rtol=0, atol=0)


def test_the_product_is_rounded_once_to_the_nearest_even_value() -> None:
    # 1/3 is between two bfloat16 values, 0.33203125 and 0.333984375; the nearer is the second.
    packed, absmax = torch.tensor([0xF7], dtype=torch.uint8), torch.tensor([1 / 3])

    back = reference.dequantize_nf4(packed, absmax, n=1, block_size=32, dtype=torch.bfloat16)

    assert back.item() == 0.333984375


@pytest.mark.parametrize("block_size", [32, 4096])
def test_no_value_is_further_off_than_half_the_widest_gap(block_size: int) -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))

    packed, absmax = reference.quantize_nf4(values, block_size=block_size)
    back = reference.dequantize_nf4(
        packed, absmax, n=10_000, block_size=block_size, dtype=torch.float32
    )

    gaps = torch.tensor(NF4_LEVELS).diff()
    bound = absmax.repeat_interleave(block_size)[:10_000] * (gaps.max() / 2 + 1e-6)
    assert ((back - values).abs() <= bound).all()
