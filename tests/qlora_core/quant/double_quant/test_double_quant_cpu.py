"""Double quantization's CPU path against the specification, bit for bit."""

import pytest
import torch

from qlora_core.errors import NonFiniteError
from qlora_core.quant.codebook import dynamic_thresholds
from qlora_core.quant.double_quant import cpu, ops, reference

CPU = torch.device("cpu")


@pytest.mark.parametrize("n", [1, 255, 256, 257, 65_536, 200_001])
@pytest.mark.parametrize("spread", [0.0, 1e-41, 0.02, 1e30])
def test_equals_the_reference(spread: float, n: int) -> None:
    absmax = torch.rand(n, generator=torch.Generator().manual_seed(n)) * spread + 0.04

    actual = ops.quantize_absmax(absmax)

    for part, expected in zip(actual, reference.quantize_absmax(absmax), strict=True):
        assert torch.equal(part, expected)


def test_a_code_is_right_for_every_upper_half_of_a_float_and_around_every_threshold() -> None:
    upper = torch.arange(2**16, dtype=torch.int32) << 16
    every = torch.cat([upper, upper | 0x7FFF, upper | 0xFFFF]).view(torch.float32)
    thresholds = dynamic_thresholds(CPU)
    around = [torch.nextafter(thresholds, torch.tensor(way)) for way in (2.0, -2.0)]
    scaled = torch.cat([every[every.abs() <= 1], thresholds, *around])

    codes = cpu._encode(scaled)

    expected = torch.searchsorted(thresholds, scaled, right=False)
    assert torch.equal(codes.long(), expected)


def test_scales_that_are_not_finite_are_refused_by_name() -> None:
    for bad in (torch.nan, torch.inf):
        with pytest.raises(NonFiniteError, match="absmax of x holds NaN or infinity"):
            ops.quantize_absmax(torch.tensor([1.0, bad]), name="absmax of x")
