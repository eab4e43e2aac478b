"""Double quantization: the specification against brute force, the kernel against it, the checks."""

from collections.abc import Callable

import pytest
import torch

from qlora_core.errors import DtypeError, LayoutError, NonFiniteError, ShapeError
from qlora_core.quant.codebook import dynamic_map
from qlora_core.quant.double_quant import launch, ops, reference


def scales(n: int) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(n)) * 0.02 + 0.04


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 700])
def test_codes_are_those_of_the_nearest_level(n: int) -> None:
    absmax = scales(n)

    codes, nested_absmax, offset = reference.quantize_absmax(absmax)

    assert offset == absmax.mean()
    levels = torch.tensor(dynamic_map(signed=True), dtype=torch.float64)
    for i in range(n):
        largest = nested_absmax[i // 256]
        scaled = (absmax[i] - offset).double() / largest.double() if largest > 0 else torch.zeros(1)
        distances = (levels - scaled).abs()
        # Division in float64 differs from the reciprocal in float32 by less than this.
        assert distances[int(codes[i])] <= distances.min() + 1e-6


def test_nested_scales_are_the_largest_distances_from_the_mean_in_blocks_of_256() -> None:
    absmax = scales(600)

    _, nested_absmax, offset = reference.quantize_absmax(absmax)

    centred = (absmax - offset).abs()
    expected = [float(part.max()) for part in centred.split(256)]
    assert nested_absmax.tolist() == expected


def test_equal_scales_come_back_exactly() -> None:
    absmax = torch.full((300,), 0.5)

    back = reference.dequantize_absmax(*reference.quantize_absmax(absmax))

    assert torch.equal(back, absmax)


def test_the_way_back_multiplies_then_adds_each_rounded() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    nested_absmax, offset = torch.tensor([0.0123]), torch.tensor(0.0517)

    back = reference.dequantize_absmax(codes, nested_absmax, offset)

    products = [torch.tensor(level) * nested_absmax[0] for level in dynamic_map(signed=True)]
    assert back.tolist() == [float(product + offset) for product in products]


def test_scales_come_back_within_the_width_of_a_code() -> None:
    absmax = scales(10_000)

    back = reference.dequantize_absmax(*reference.quantize_absmax(absmax))

    relative = (back - absmax).abs() / absmax
    assert relative.mean() < 0.005
    assert relative.max() < 0.02


@pytest.mark.parametrize("n", [1, 255, 256, 1025, 5000])
def test_the_kernel_equals_the_reference(n: int, kernel_device: str) -> None:
    absmax = scales(n).to(kernel_device)

    actual = launch.launch_quantize(absmax)

    for part, expected in zip(actual, reference.quantize_absmax(absmax), strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize("n", [300, 1024, 2048 + 77])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: torch.full((n,), 0.5),
        torch.zeros,
        lambda n: scales(n) * 1e-40,  # subnormal: the reciprocal of a distance overflows
        lambda n: torch.where(torch.arange(n) == 7, 100.0, scales(n)),
        lambda n: torch.where(torch.arange(n) % 2 == 0, 0.0, 1e34),
    ],
    ids=["equal", "zero", "subnormal", "one outlier", "extreme"],
)
def test_the_kernel_equals_the_reference_on_hard_scales(
    make: Callable[[int], torch.Tensor], n: int, kernel_device: str
) -> None:
    absmax = make(n).to(kernel_device)

    actual = launch.launch_quantize(absmax)

    for part, expected in zip(actual, reference.quantize_absmax(absmax), strict=True):
        assert torch.equal(part, expected)


def test_quantizing_refuses_what_is_no_list_of_scales() -> None:
    with pytest.raises(DtypeError, match="float16"):
        ops.quantize_absmax(torch.ones(4, dtype=torch.float16))
    with pytest.raises(ShapeError, match=r"not \[2, 2\]"):
        ops.quantize_absmax(torch.ones(2, 2))
    with pytest.raises(ShapeError, match=r"not \[0\]"):
        ops.quantize_absmax(torch.ones(0))
    with pytest.raises(NonFiniteError, match="scales of x holds NaN"):
        ops.quantize_absmax(torch.tensor([1.0, torch.nan]), name="scales of x")


def test_dequantizing_refuses_parts_that_do_not_belong_together() -> None:
    codes, nested_absmax, offset = reference.quantize_absmax(scales(300))

    with pytest.raises(ShapeError, match="need 2 nested scales, not 1"):
        ops.dequantize_absmax(codes, nested_absmax[:1], offset)
    with pytest.raises(ShapeError, match="offset must be one number"):
        ops.dequantize_absmax(codes, nested_absmax, torch.zeros(2))
    with pytest.raises(DtypeError, match=r"codes must be torch\.uint8"):
        ops.dequantize_absmax(codes.int(), nested_absmax, offset)
    with pytest.raises(LayoutError, match="offset is on meta"):
        ops.dequantize_absmax(codes, nested_absmax, offset.to("meta"))


def test_finite_scales_whose_sum_is_beyond_float32_are_refused() -> None:
    with pytest.raises(NonFiniteError, match=r"sum of scales of x is beyond float32.*=False"):
        ops.quantize_absmax(torch.full((4,), 3e38), name="scales of x")
