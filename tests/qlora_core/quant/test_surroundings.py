"""What a process has set for all of torch, its default dtype and its default device, changes no bit."""

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qlora_core import NF4Weight, quantize_nf4
from qlora_core.quant import comparators


def clear_tables() -> None:
    """Forget the tables that `qlora_core.quant` makes once per process."""
    for name, module in list(sys.modules.items()):
        if name.startswith("qlora_core.quant"):
            for member in vars(module).values():
                if hasattr(member, "cache_clear"):
                    member.cache_clear()


@pytest.fixture(params=[torch.float64, torch.bfloat16, "meta"], ids=str)
def _surroundings(request: pytest.FixtureRequest) -> Iterator[None]:
    clear_tables()
    if isinstance(request.param, torch.dtype):
        before = torch.get_default_dtype()
        torch.set_default_dtype(request.param)
        yield
        torch.set_default_dtype(before)
    else:
        with torch.device(request.param):
            yield
    clear_tables()


def everything_computed(weight: Tensor) -> list[Tensor]:
    """Codes, scales and values in each form that the package makes, and what it reads of what it wrote."""
    found: list[Tensor] = []
    for scale in ("absmax", "mse"):
        for double_quant in (False, True):
            quantized = quantize_nf4(weight, scale=scale, double_quant=double_quant)
            back = NF4Weight.from_bitsandbytes(quantized.to_bitsandbytes("w"), "w")
            found += [quantized.packed, quantized.absmax, quantized.dequantize(), back.dequantize()]
    for quantize in (
        comparators.quantize_fp4,
        comparators.quantize_e2m1,
        comparators.quantize_int4,
        comparators.quantize_int8,
    ):
        found.append(quantize(weight).dequantize())
    return found


WEIGHT = torch.randn(150, 130, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def expected() -> list[Tensor]:
    clear_tables()
    return everything_computed(WEIGHT)


@pytest.mark.usefixtures("expected", "_surroundings")
def test_every_bit_is_the_same(expected: list[Tensor]) -> None:
    actual = everything_computed(WEIGHT)

    assert len(actual) == len(expected) == 20
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
