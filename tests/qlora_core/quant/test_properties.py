"""What holds for every tensor that NF4 takes, and for every one that it refuses."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_core import NF4Weight, quantize_nf4
from qlora_core.errors import DtypeError, EngineError, LayoutError, NonFiniteError, ShapeError
from qlora_core.quant.codebook import BLOCK_SIZES, NF4_LEVELS
from qlora_core.quant.nf4 import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LEVELS = torch.tensor(NF4_LEVELS, dtype=torch.float64)

dtypes = st.sampled_from(DTYPES)
block_sizes = st.sampled_from(BLOCK_SIZES)
many = settings(max_examples=100, deadline=None)


@st.composite
def values(draw: st.DrawFn) -> Tensor:
    """Up to 300 finite values of any dtype and size, from the smallest subnormal to the largest."""
    dtype = draw(dtypes)
    width = 32 if dtype == torch.float32 else 16
    numbers = draw(
        st.lists(
            st.floats(width=width, allow_nan=False, allow_infinity=False), min_size=1, max_size=300
        )
    )
    tensor = torch.tensor(numbers, dtype=dtype)
    assume(bool(tensor.isfinite().all()))
    return tensor


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Up to 1500 values that are spread like a weight's, of any dtype and of scales that vary."""
    n = draw(st.integers(1, 1500))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    spread = 2.0 ** draw(st.integers(-8, 8))
    scales = 1 + torch.rand(-(-n // 32), generator=generator).repeat_interleave(32)[:n]
    return (torch.randn(n, generator=generator) * scales * spread).to(draw(dtypes))


def per_element(scales: Tensor, weight: NF4Weight) -> Tensor:
    n = weight.shape.numel()
    return scales.double().repeat_interleave(weight.block_size)[:n]


def half_steps(original: Tensor, absmax: Tensor) -> Tensor:
    """How far from each value the nearer of the two levels around it is, at most."""
    scaled = (original.double() / absmax.clamp(min=1e-300)).clamp(-1, 1)
    above = torch.searchsorted(LEVELS, scaled).clamp(1, 15)
    return (LEVELS[above] - LEVELS[above - 1]) / 2 * absmax


def rounding(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding may add: to the result's dtype, of the scaled value, and next to nothing at all.

    A block whose largest value is below 2^-128 may come back as zeros.
    """
    limits = torch.finfo(dtype)
    return largest * (limits.eps / 2 + 2.0**-20) + limits.smallest_normal * limits.eps + 2.0**-128


@many
@given(original=values(), block_size=block_sizes)
def test_no_value_is_further_off_than_half_a_step_of_its_block(
    original: Tensor, block_size: int
) -> None:
    weight = quantize_nf4(original, block_size=block_size, double_quant=False)

    absmax = per_element(weight.scales(), weight)
    error = (weight.dequantize().double() - original.double()).abs()
    assert (error <= half_steps(original, absmax) + rounding(absmax, original.dtype)).all()


@many
@given(original=weights(), block_size=block_sizes)
def test_double_quantization_adds_no_more_than_its_scales_are_off(
    original: Tensor, block_size: int
) -> None:
    _, exact = reference.quantize_nf4(original, block_size=block_size)

    weight = quantize_nf4(original, block_size=block_size)

    absmax, scales = per_element(exact, weight), per_element(weight.scales(), weight)
    error = (weight.dequantize().double() - original.double()).abs()
    bound = half_steps(original, absmax) + (scales - absmax).abs()
    assert (error <= bound + rounding(torch.maximum(absmax, scales), original.dtype)).all()


@many
@given(
    codes=st.lists(st.integers(0, 15), min_size=1, max_size=200),
    scale=st.floats(2.0**-7, 2.0**7, width=16),
    ends=st.sampled_from([0, 15]),
    dtype=dtypes,
)
def test_levels_times_a_scale_come_back_exactly(
    codes: list[int], scale: float, ends: int, dtype: torch.dtype
) -> None:
    levels = torch.tensor(NF4_LEVELS)[codes]
    levels[::32] = NF4_LEVELS[ends]  # so that each block's largest value is the scale
    original = (levels * torch.tensor(scale).to(dtype).float()).to(dtype)

    weight = quantize_nf4(original, block_size=32, double_quant=False)

    assert torch.equal(weight.dequantize(), original)


@many
@given(original=weights(), block_size=block_sizes)
def test_quantizing_again_gives_the_same_codes_and_scales(
    original: Tensor, block_size: int
) -> None:
    # A block's largest value comes back exactly, so the scale is found again.
    once = quantize_nf4(original, block_size=block_size, double_quant=False)

    again = quantize_nf4(once.dequantize(), block_size=block_size, double_quant=False)

    assert torch.equal(again.packed, once.packed)
    assert torch.equal(again.absmax, once.absmax)


@many
@given(original=weights(), block_size=block_sizes)
def test_quantizing_again_gives_the_same_codes_also_with_scales_in_8_bits(
    original: Tensor, block_size: int
) -> None:
    # Now the largest value comes back as the scale that 8 bits hold: another one than the first
    # time, whose own 8 bits may differ again; but the codes count in it all the same.
    once = quantize_nf4(original, block_size=block_size)
    assume(bool((once.scales() > 0).all()))

    again = quantize_nf4(once.dequantize(), block_size=block_size)

    assert torch.equal(again.packed, once.packed)


def every_layout(tensor: Tensor) -> list[Tensor]:
    """Tensors of the same values in the same order in other memory, strides or graphs."""
    spaced = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)
    spaced[..., 0] = tensor
    layouts = [tensor, spaced[..., 0], tensor.clone().requires_grad_()]
    if tensor.dim() >= 2:
        layouts.append(tensor.mT.contiguous().mT)
        layouts.append(tensor.flip(0).flip(0).transpose(0, -1).clone().transpose(0, -1))
    return layouts


@many
@given(
    shape=st.lists(st.integers(1, 9), max_size=4),
    dtype=dtypes,
    block_size=block_sizes,
    double_quant=st.booleans(),
)
def test_any_shape_and_any_strides_are_taken_in_the_order_of_the_elements(
    shape: list[int], dtype: torch.dtype, block_size: int, double_quant: bool
) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    how: dict[str, Any] = {"block_size": block_size, "double_quant": double_quant}
    expected = quantize_nf4(tensor.reshape(-1), **how)

    for layout in every_layout(tensor):
        weight = quantize_nf4(layout, **how)

        assert weight.shape == tensor.shape
        assert torch.equal(weight.packed, expected.packed)
        assert torch.equal(weight.absmax, expected.absmax)
        back = weight.dequantize()
        assert torch.equal(back, expected.dequantize().view(tensor.shape))
        assert (back.dtype, back.requires_grad) == (dtype, False)


@many
@given(original=values(), at=st.integers(0, 299), bad=st.sampled_from([torch.nan, torch.inf]))
def test_a_value_that_is_not_finite_is_refused_with_the_tensors_name(
    original: Tensor, at: int, bad: float
) -> None:
    original[at % len(original)] = bad if at % 2 else -bad

    with pytest.raises(NonFiniteError, match=r"^layers\.7\.q_proj holds NaN or infinity"):
        quantize_nf4(original, name="layers.7.q_proj")


WRONG_OUTS: dict[str, tuple[type[EngineError], Any]] = {
    "of float64": (DtypeError, lambda n: torch.zeros(n, dtype=torch.float64)),
    "of an integer": (DtypeError, lambda n: torch.zeros(n, dtype=torch.int32)),
    "too long": (ShapeError, lambda n: torch.zeros(n + 1)),
    "too short": (ShapeError, lambda n: torch.zeros(n - 1)),
    "empty": (ShapeError, lambda _: torch.zeros(0)),
    "with gaps": (LayoutError, lambda n: torch.zeros(2 * n)[::2]),
    "one element for all": (LayoutError, lambda n: torch.zeros(1).expand(n)),
    "elsewhere": (LayoutError, lambda n: torch.zeros(n, device="meta")),
    "with a gradient": (LayoutError, lambda n: torch.zeros(n, requires_grad=True)),
}


@many
@given(n=st.integers(2, 300), wrong=st.sampled_from(sorted(WRONG_OUTS)), double_quant=st.booleans())
def test_an_out_that_does_not_fit_is_refused_and_left_alone(
    n: int, wrong: str, double_quant: bool
) -> None:
    error, make = WRONG_OUTS[wrong]
    weight, out = quantize_nf4(torch.ones(n), double_quant=double_quant), make(n)

    with pytest.raises(error, match=r"^out "):
        weight.dequantize(torch.float32, out=out)

    assert out.device.type == "meta" or out.eq(0).all()


def test_an_out_of_another_dtype_than_the_one_asked_for_is_refused() -> None:
    weight = quantize_nf4(torch.ones(64))

    with pytest.raises(DtypeError, match=r"out must be torch\.bfloat16, not torch\.float32"):
        weight.dequantize(torch.bfloat16, out=torch.empty(64))
