"""The Triton kernels for NF4 against the reference, bit for bit, on what is hard to get right.

Kernels take whole tiles and a rest; sizes here are below, on and beyond a tile, odd, and end in the
middle of a block. Outputs are full of NaN, or of the largest integer, before a kernel writes them.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from qlora_core.quant.codebook import BLOCK_SIZES, NF4_LEVELS, NF4_THRESHOLDS
from qlora_core.quant.double_quant import reference as double_quant_reference
from qlora_core.quant.launches import (
    DEQUANTIZE_NF4,
    DEQUANTIZE_NF4_CANDIDATES,
    QUANTIZE_NF4,
    QUANTIZE_NF4_CANDIDATES,
    Launch,
)
from qlora_core.quant.nf4 import launch, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TILE = DEQUANTIZE_NF4.tile
# One element; a short block; one tile; a tile and an odd element; two tiles and a short block.
SIZES = [1, 31, 1000, TILE, TILE + 1, 2 * TILE + 77]


def normal(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n))


def thresholds(n: int) -> Tensor:
    """Blocks of 32 with 1.0 in them, so that the rest is scaled by one: on thresholds and beside."""
    on = torch.tensor(NF4_THRESHOLDS)
    near = torch.cat([on, on.nextafter(torch.tensor(2.0)), on.nextafter(torch.tensor(-2.0))])
    blocks = near.repeat(31).view(-1, 31)
    return torch.cat([torch.ones(len(blocks), 1), blocks], dim=1).view(-1)[:n]


def subnormal(n: int) -> Tensor:
    """Blocks whose largest value is a subnormal float32, where its reciprocal overflows."""
    return normal(n) * 1e-40


def largest(n: int) -> Tensor:
    """Plus and minus the largest finite value of float16 among small ones."""
    values = normal(n)
    values[::37], values[5::41] = 65504.0, -65504.0
    return values


def outliers(n: int) -> Tensor:
    """One value in each block of 64 a thousand times the others."""
    values = normal(n)
    values[17::64] *= 1000
    return values


def constant(n: int) -> Tensor:
    """Each block of 32 one value, of both signs."""
    return torch.linspace(-3, 3, -(-n // 32)).repeat_interleave(32)[:n]


def zeros(n: int) -> Tensor:
    """Blocks of zeros between others, some of them negative zeros."""
    values = normal(n)
    values[64 : n // 2] = 0
    values[n // 2 : n // 2 + 640] = -0.0
    return values


@pytest.fixture(autouse=True)
def _new_memory_is_full_of_nan() -> Iterator[None]:
    """Make `torch.empty` fill what it gives, so that a cell that no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


MAKERS = [normal, thresholds, subnormal, largest, outliers, constant, zeros]


def filled(n: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.full((n,), torch.nan, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("n", SIZES)
def test_quantizing_equals_the_reference(
    n: int, block_size: int, dtype: torch.dtype, kernel_device: str
) -> None:
    values = normal(n).to(kernel_device, dtype)

    packed, absmax = launch.launch_quantize(values, block_size=block_size)

    expected_packed, expected_absmax = reference.quantize_nf4(values, block_size=block_size)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(absmax, expected_absmax)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [32, 4096])
def test_quantizing_hard_values_equals_the_reference(
    make: Callable[[int], Tensor], block_size: int, dtype: torch.dtype, kernel_device: str
) -> None:
    values = make(TILE + 333).to(kernel_device, dtype)

    packed, absmax = launch.launch_quantize(values, block_size=block_size)

    expected_packed, expected_absmax = reference.quantize_nf4(values, block_size=block_size)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(absmax, expected_absmax)


@pytest.mark.parametrize("candidate", QUANTIZE_NF4_CANDIDATES, ids=str)
def test_every_candidate_quantizes_alike(candidate: Launch, kernel_device: str) -> None:
    values = normal(2 * candidate.tile + 5).to(kernel_device)

    packed, absmax = launch.launch_quantize(values, block_size=64, launch=candidate)

    expected_packed, expected_absmax = reference.quantize_nf4(values, block_size=64)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(absmax, expected_absmax)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", [40, TILE + 40], ids=["in a tile", "in the rest"])
def test_a_value_that_is_not_finite_shows_in_its_scale_and_nowhere_else(
    at: int, dtype: torch.dtype, bad: float, kernel_device: str
) -> None:
    values = torch.ones(TILE + 100, dtype=dtype, device=kernel_device)
    values[at] = bad

    _, absmax = launch.launch_quantize(values, block_size=32)

    assert (~absmax.isfinite()).nonzero().flatten().tolist() == [at // 32]


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("n", SIZES)
def test_dequantizing_equals_the_references_one_after_the_other(
    n: int, block_size: int, dtype: torch.dtype, nested: bool, kernel_device: str
) -> None:
    packed, absmax = reference.quantize_nf4(normal(n).to(kernel_device), block_size=block_size)
    out = filled(n, dtype, kernel_device)

    scales = dequantize(packed, absmax, out, block_size=block_size, nested=nested)

    expected = reference.dequantize_nf4(packed, scales, n=n, block_size=block_size, dtype=dtype)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("candidate", DEQUANTIZE_NF4_CANDIDATES, ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_every_candidate_dequantizes_alike(
    candidate: Launch, block_size: int, kernel_device: str
) -> None:
    n = 3 * candidate.tile + 5  # at block size 32 more than one nested block
    packed, absmax = reference.quantize_nf4(normal(n).to(kernel_device), block_size=block_size)
    out = filled(n, torch.bfloat16, kernel_device)

    scales = dequantize(
        packed, absmax, out, block_size=block_size, nested=True, candidate=candidate
    )

    expected = reference.dequantize_nf4(packed, scales, n=n, block_size=block_size, dtype=out.dtype)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_comes_back_as_its_level_times_its_scale(
    dtype: torch.dtype, kernel_device: str
) -> None:
    packed = torch.arange(256, dtype=torch.uint8).repeat(TILE // 512)
    absmax = torch.linspace(-2, 2, TILE // 64)
    out = filled(TILE, dtype, kernel_device)

    dequantize(packed.to(kernel_device), absmax.to(kernel_device), out, block_size=64, nested=False)

    levels = torch.tensor(NF4_LEVELS)
    codes = [code for byte in packed.tolist() for code in (byte // 16, byte % 16)]
    expected = (levels[codes].view(-1, 64) * absmax[:, None]).view(-1).to(dtype)
    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("start", [1, 2, 3, 4])
def test_codes_and_output_may_begin_anywhere_in_memory(start: int, kernel_device: str) -> None:
    n = TILE + 64
    packed, absmax = reference.quantize_nf4(normal(n).to(kernel_device), block_size=64)
    moved = torch.zeros(packed.numel() + start, dtype=torch.uint8, device=kernel_device)
    moved[start:] = packed
    memory = filled(n + start, torch.bfloat16, kernel_device)

    launch.launch_dequantize(moved[start:], absmax, None, None, memory[start:], block_size=64)

    expected = reference.dequantize_nf4(packed, absmax, n=n, block_size=64, dtype=torch.bfloat16)
    assert torch.equal(memory[start:], expected)
    assert memory[:start].isnan().all()


@pytest.mark.parametrize("start", [1, 2, 3])
def test_values_may_begin_anywhere_in_memory(start: int, kernel_device: str) -> None:
    memory = normal(TILE + 100 + start).to(kernel_device, torch.bfloat16)

    packed, absmax = launch.launch_quantize(memory[start:], block_size=64)

    expected_packed, expected_absmax = reference.quantize_nf4(memory[start:], block_size=64)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(absmax, expected_absmax)


def test_tiles_fit_every_block_size_and_lie_in_one_nested_block() -> None:
    for candidate in (QUANTIZE_NF4, *QUANTIZE_NF4_CANDIDATES):
        assert candidate.tile % max(BLOCK_SIZES) == 0
    for candidate in (DEQUANTIZE_NF4, *DEQUANTIZE_NF4_CANDIDATES):
        assert candidate.tile % max(BLOCK_SIZES) == 0
        assert (256 * min(BLOCK_SIZES)) % candidate.tile == 0


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    out: Tensor,
    *,
    block_size: int,
    nested: bool,
    candidate: Launch = DEQUANTIZE_NF4,
) -> Tensor:
    """Launch into ``out``; give the scales that the result must have been made with."""
    nested_absmax = offset = None
    scales = absmax
    if nested:
        absmax, nested_absmax, offset = double_quant_reference.quantize_absmax(absmax)
        scales = double_quant_reference.dequantize_absmax(absmax, nested_absmax, offset)
    launch.launch_dequantize(
        packed, absmax, nested_absmax, offset, out, block_size=block_size, launch=candidate
    )
    return scales
