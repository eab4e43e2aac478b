"""NF4 on the CPU against bitsandbytes on the CPU, bit for bit; and where the two differ, why.

Its CPU code is an oracle for NF4 codes and their scales, not for the 8-bit codes of double
quantization. docs/formats/nf4.md lists what differs on purpose: each has a test of its own below.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from safetensors import safe_open
from torch import Tensor

from qlora_core import NF4Weight, quantize_nf4
from qlora_core.quant.codebook import BLOCK_SIZES, NF4_THRESHOLDS, dynamic_map
from qlora_core.quant.double_quant import ops as scale_ops
from qlora_core.quant.nf4 import ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TINY_LLAMA = Path(__file__).resolve().parents[3] / "examples" / "tiny-llama" / "model.safetensors"

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_block_size = pytest.mark.parametrize("block_size", BLOCK_SIZES)


def normal(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(n, generator=torch.Generator().manual_seed(n)) * 0.02).to(dtype)


def on_and_beside_thresholds(block_size: int, dtype: torch.dtype) -> Tensor:
    """Blocks of scale 1 with a value on each threshold and its neighbours on both sides in ``dtype``."""
    on = torch.tensor(NF4_THRESHOLDS).to(dtype)
    ways = [torch.tensor(way, dtype=dtype) for way in (2.0, -2.0)]
    values = torch.cat([on, *(torch.nextafter(on, way) for way in ways)])
    blocks: list[Tensor] = []
    for part in values.split(block_size - 1):
        block = torch.zeros(block_size, dtype=dtype)
        block[0] = 1
        block[1 : 1 + len(part)] = part
        # Powers of two scale without rounding.
        blocks += [block, -block, block / 128]
    return torch.cat(blocks)


def adversarial(block_size: int, dtype: torch.dtype) -> Tensor:
    """Whole blocks of what quantizers get wrong."""
    limits = torch.finfo(dtype)
    outlier, subnormal, largest = (normal(block_size, dtype) for _ in range(3))
    outlier[block_size // 2] = 100
    subnormal[1::2] = limits.smallest_normal / 8
    largest = largest.clamp(-1, 1) * limits.max
    largest[:2] = torch.tensor([limits.max, limits.min])
    constants = [0.3, -0.3, 0.0, -0.0, limits.max, limits.min, limits.smallest_normal]
    return torch.cat(
        [on_and_beside_thresholds(block_size, dtype), outlier, subnormal, largest]
        + [torch.full((block_size,), constant, dtype=dtype) for constant in constants]
    )


def by_bitsandbytes(values: Tensor, block_size: int, **settings: Any) -> tuple[Tensor, Any]:
    """Its codes and state of a single row, in which no block reaches over several."""
    return bnb.quantize_4bit(values.view(1, -1), blocksize=block_size, quant_type="nf4", **settings)


def assert_equal_codes_scales_and_values(values: Tensor, block_size: int) -> None:
    packed, absmax = ops.quantize_nf4(values, block_size=block_size)
    back = ops.dequantize_nf4(
        packed, absmax, n=values.numel(), block_size=block_size, dtype=values.dtype
    )

    their_packed, state = by_bitsandbytes(values, block_size, compress_statistics=False)
    assert torch.equal(packed, their_packed.view(-1))
    assert torch.equal(absmax, state.absmax)
    assert torch.equal(back, bnb.dequantize_4bit(their_packed, state).view(-1))


@every_dtype
@every_block_size
@pytest.mark.parametrize("n", [1, 2, 31, 33, 4095, 4096, 100_003])
def test_random_weights_of_any_length_get_the_same_codes_scales_and_values(
    n: int, block_size: int, dtype: torch.dtype
) -> None:
    assert_equal_codes_scales_and_values(normal(n, dtype), block_size)


@every_dtype
@every_block_size
@pytest.mark.parametrize("rest", [0, 17])
def test_adversarial_weights_get_the_same_codes_scales_and_values(
    rest: int, block_size: int, dtype: torch.dtype
) -> None:
    values = torch.cat([adversarial(block_size, dtype), normal(rest, dtype)])

    assert_equal_codes_scales_and_values(values, block_size)


@every_dtype
def test_the_weights_of_tiny_llama_get_the_same_codes_scales_and_values(dtype: torch.dtype) -> None:
    with safe_open(TINY_LLAMA, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is no dict
            assert_equal_codes_scales_and_values(file.get_tensor(name).to(dtype).view(-1), 64)


@every_dtype
@every_block_size
def test_what_bitsandbytes_quantized_twice_has_the_same_values_here(
    block_size: int, dtype: torch.dtype
) -> None:
    values = normal(300 * block_size, dtype)  # two nested blocks, the second one short
    their_packed, state = by_bitsandbytes(values, block_size, compress_statistics=True)
    tensors = {f"w.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}

    weight = NF4Weight.from_bitsandbytes({"w": their_packed, **tensors}, "w")

    assert torch.equal(weight.dequantize(), bnb.dequantize_4bit(their_packed, state))


@every_block_size
def test_the_mean_and_the_nested_scales_are_the_same(block_size: int) -> None:
    values = normal(300 * block_size)

    weight = quantize_nf4(values, block_size=block_size)

    _, state = by_bitsandbytes(values, block_size, compress_statistics=True)
    assert weight.offset is not None
    assert weight.nested_absmax is not None
    assert torch.equal(weight.offset, state.offset)
    assert torch.equal(weight.nested_absmax, state.state2.absmax)


def many_scales() -> Tensor:
    return torch.rand(2**18, generator=torch.Generator().manual_seed(0)) * 0.02 + 0.04


def test_scale_codes_are_the_nearest_by_brute_force() -> None:
    absmax = many_scales()[:20_000]

    codes, nested_absmax, offset = scale_ops.quantize_absmax(absmax)

    inverse = (1 / nested_absmax).repeat_interleave(256)[: len(absmax)]
    scaled = ((absmax - offset) * inverse).double()
    distances = (scaled[:, None] - torch.tensor(dynamic_map(), dtype=torch.float64)).abs()
    chosen = distances.gather(1, codes.long()[:, None]).view(-1)
    # A midpoint of two levels, rounded to float32, is off by at most this.
    assert (chosen <= distances.amin(dim=1) + 2.0**-24).all()


def test_differs_on_purpose_scale_codes_are_the_nearest_where_bitsandbytes_are_one_off() -> None:
    # Its CPU code finds them in a table of 65,536 entries, too coarse for the levels next to zero.
    absmax = many_scales()

    codes, nested_absmax, offset = scale_ops.quantize_absmax(absmax)

    their_codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    assert torch.equal(nested_absmax, state.absmax)
    apart = (codes.int() - their_codes.int()).abs()
    next_to_zero = (absmax - offset).abs() < 1e-5 * nested_absmax.repeat_interleave(256)
    assert 0 < (apart > 0).float().mean() < 0.005
    assert apart[~next_to_zero].max() == 1
    assert apart[next_to_zero].max() <= 4


def test_differs_on_purpose_a_block_of_subnormal_numbers_keeps_its_own_scale() -> None:
    largest = 2.0**-127  # bitsandbytes' CPU code divides by no less than 1e-38
    values = torch.full((64,), largest)

    packed, absmax = ops.quantize_nf4(values)

    their_packed, state = by_bitsandbytes(values, 64, compress_statistics=False)
    assert torch.equal(absmax, state.absmax)
    assert packed.unique().tolist() == [0xFF]
    assert their_packed.unique().tolist() != [0xFF]
    assert torch.equal(ops.dequantize_nf4(packed, absmax, n=64), values)


def test_differs_on_purpose_a_short_last_block_of_zeros_has_the_scale_zero() -> None:
    values = torch.cat([torch.ones(64), torch.zeros(10)])

    packed, absmax = ops.quantize_nf4(values)

    their_packed, state = by_bitsandbytes(values, 64, compress_statistics=False)
    assert torch.equal(packed, their_packed.view(-1))
    assert absmax.tolist() == [1.0, 0.0]
    assert state.absmax[1] == torch.tensor(1e-38)


def test_differs_on_purpose_a_short_last_block_is_scaled_like_a_whole_one() -> None:
    # The second value lies on a threshold when divided by the first, above it when multiplied by
    # its reciprocal, as whole blocks are, and as GPUs do everywhere. bitsandbytes' CPU code divides.
    short = torch.tensor([1.4962565898895264, -1.2689697742462158])
    values = torch.cat([short, torch.zeros(62), short])

    packed, _ = ops.quantize_nf4(values)

    their_packed, _ = by_bitsandbytes(values, 64, compress_statistics=False)
    assert packed[[0, -1]].tolist() == [0xF1, 0xF1]
    assert their_packed.view(-1)[[0, -1]].tolist() == [0xF1, 0xF0]


@every_dtype
def test_differs_on_purpose_blocks_that_reach_over_several_rows_keep_their_scales(
    dtype: torch.dtype,
) -> None:
    # Where the CPU has AVX512, bitsandbytes 0.50.2 finds each row's first scale anew; so the rows
    # here are no multiple of a block, and the values are held to its codes and scales spelled out.
    values = normal(48 * 80, dtype).view(48, 80)
    their_packed, state = bnb.quantize_4bit(values, compress_statistics=False, quant_type="nf4")

    back = ops.dequantize_nf4(their_packed.view(-1), state.absmax, n=values.numel(), dtype=dtype)

    their_codes = torch.stack([their_packed >> 4, their_packed & 15], dim=1).view(-1)
    levels = bnb.get_4bit_type("nf4", device="cpu")[their_codes.long()]
    assert torch.equal(back, (levels * state.absmax.repeat_interleave(64)).to(dtype))
