"""scale="mse": less squared error in the same bits, against a search that tries everything."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors import safe_open

from qlora_core import NF4Weight, quantize_nf4
from qlora_core.errors import ConfigError, NonFiniteError
from qlora_core.quant import scale_search
from tests.qlora_core.quant import brute_force

TINY_LLAMA = Path(__file__).parents[3] / "examples" / "tiny-llama" / "model.safetensors"
LEVELS = torch.tensor([float(level) for level in brute_force.LEVELS], dtype=torch.float64)
LARGEST = torch.finfo(torch.float32).max


def normal(n: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n))


def real(kind: str) -> torch.Tensor:
    with safe_open(TINY_LLAMA, framework="pt") as file:
        return file.get_tensor(f"model.layers.1.{kind}.weight")


def heavy_tailed(n: int) -> torch.Tensor:
    return normal(n) / normal(n + 1)[:n].abs().clamp(min=0.01)


def one_outlier_per_block(n: int) -> torch.Tensor:
    values = 0.01 * normal(n)
    values[::64] = 3.0
    return values


ADVERSARIAL = {
    "zeros": torch.zeros(640),
    "constant blocks": torch.linspace(-2, 2, 10).repeat_interleave(64),
    "blocks of one magnitude": normal(640).sign() * 0.3,
    "one outlier in each block": one_outlier_per_block(640),
    "levels times a scale": LEVELS.float().repeat(40) * torch.linspace(0.1, 3, 640),
    "zeros among values": normal(640) * (torch.arange(640) % 3 == 0),
    "one value": torch.tensor([-0.7]),
    "an odd number": normal(327),
    "subnormal": normal(640) * 1e-40,
    "smallest": torch.full((640,), 1e-45),
    "huge": normal(640).sign() * LARGEST / 16,  # whose sum, for the mean, is a float32 still
    "of very different sizes": normal(640) * torch.logspace(-30, 30, 640),
    "blocks whose scales are far apart": normal(640)
    * torch.logspace(-3, 3, 10).repeat_interleave(64),
}


def errors(weight: torch.Tensor, quantized: NF4Weight) -> torch.Tensor:
    """The sum of squared errors of each block, float64."""
    back = quantized.dequantize(torch.float32).double().view(-1)
    squares = (weight.double().view(-1) - back).square()
    return torch.stack([part.sum() for part in squares.split(quantized.block_size)])


def least_error(block: torch.Tensor) -> float:
    """The least squared error of a block over 4,000 scales, each with the nearest levels."""
    scales = torch.linspace(0.3, 1.9, 4000, dtype=torch.float64) * block.abs().max()
    middles = (LEVELS[1:] + LEVELS[:-1]) / 2
    nearest = LEVELS[torch.bucketize(block / scales[:, None], middles)] * scales[:, None]
    return float((block - nearest).square().sum(dim=1).min())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
@pytest.mark.parametrize("make", [normal, heavy_tailed])
def test_no_block_has_more_error_than_before_and_most_have_less(
    make: Callable[[int], torch.Tensor], block_size: int, double_quant: bool
) -> None:
    weight = make(40_001)

    before = quantize_nf4(weight, block_size=block_size, double_quant=double_quant)
    after = quantize_nf4(weight, block_size=block_size, double_quant=double_quant, scale="mse")

    old, new = errors(weight, before), errors(weight, after)
    assert (new <= old).all()
    assert (new < old).double().mean() > 0.5
    assert after.nbytes == before.nbytes


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("case", ADVERSARIAL, ids=lambda case: case.replace(" ", "-"))
def test_no_block_of_an_awkward_weight_has_more_error_than_before(
    case: str, double_quant: bool
) -> None:
    weight = ADVERSARIAL[case]

    before = quantize_nf4(weight, double_quant=double_quant)
    after = quantize_nf4(weight, double_quant=double_quant, scale="mse")

    assert (errors(weight, after) <= errors(weight, before)).all()
    assert after.dequantize().isfinite().all()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["self_attn.q_proj", "mlp.down_proj"])
def test_real_weights_lose_more_than_a_tenth_of_their_squared_error(
    kind: str, double_quant: bool
) -> None:
    weight = real(kind)

    before = quantize_nf4(weight, double_quant=double_quant)
    after = quantize_nf4(weight, double_quant=double_quant, scale="mse")

    old, new = errors(weight, before), errors(weight, after)
    assert (new <= old).all()
    assert new.sum() < 0.9 * old.sum()


@pytest.mark.parametrize("block_size", [32, 64, 256, 1024])
def test_hardly_any_error_is_left_that_a_search_over_every_scale_would_remove(
    block_size: int,
) -> None:
    weight = normal(2**14)

    found = errors(
        weight, quantize_nf4(weight, block_size=block_size, scale="mse", double_quant=False)
    )

    least = sum(least_error(block) for block in weight.double().split(block_size))
    assert least <= found.sum() < 1.01 * least


def test_blocks_of_zeros_stay_zeros() -> None:
    weight = normal(64 * 100).view(100, 64)
    weight[3:9] = 0

    for double_quant in (False, True):
        back = quantize_nf4(weight, double_quant=double_quant, scale="mse").dequantize()
        assert back[3:9].eq(0).all()


def test_a_missing_last_odd_element_still_counts_as_zero() -> None:
    quantized = quantize_nf4(normal(129), double_quant=False, scale="mse")

    assert quantized.packed.shape == (65,)
    assert int(quantized.packed[-1]) & 0x0F == 7


def test_the_nested_scales_and_the_offset_stay_those_of_the_largest_values() -> None:
    weight = normal(64 * 300)

    before, after = quantize_nf4(weight), quantize_nf4(weight, scale="mse")

    assert before.nested_absmax is not None
    assert after.nested_absmax is not None
    assert torch.equal(after.nested_absmax, before.nested_absmax)
    assert torch.equal(torch.as_tensor(after.offset), torch.as_tensor(before.offset))
    assert not torch.equal(after.absmax, before.absmax)


@pytest.mark.parametrize("double_quant", [False, True])
def test_bitsandbytes_reads_the_same_values(double_quant: bool) -> None:
    weight = normal(64 * 512).view(512, 64)
    quantized = quantize_nf4(weight, double_quant=double_quant, scale="mse")
    tensors = quantized.to_bitsandbytes("w")

    codes = tensors.pop("w")
    theirs = dequantize_4bit(codes, QuantState.from_dict(tensors, device=torch.device("cpu")))

    assert torch.equal(theirs, quantized.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_dtype_of_the_weight_changes_nothing(dtype: torch.dtype) -> None:
    weight = normal(6400).to(dtype)

    quantized = quantize_nf4(weight, scale="mse")

    of_floats = quantize_nf4(weight.float(), scale="mse")
    assert torch.equal(quantized.packed, of_floats.packed)
    assert torch.equal(quantized.absmax, of_floats.absmax)
    assert quantized.dtype == dtype


def test_pieces_of_a_weight_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(10_000)
    whole = quantize_nf4(weight, scale="mse")

    monkeypatch.setattr(scale_search, "_CPU_CHUNK", 1024)
    pieces = quantize_nf4(weight, scale="mse")

    assert torch.equal(pieces.packed, whole.packed)
    assert torch.equal(pieces.absmax, whole.absmax)


@pytest.mark.gpu
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_gpu_finds_scales_as_good_as_a_cpus(double_quant: bool) -> None:
    weight = normal(100_001)

    on_cpu = quantize_nf4(weight, double_quant=double_quant, scale="mse")
    before = quantize_nf4(weight.cuda(), double_quant=double_quant)
    on_gpu = quantize_nf4(weight.cuda(), double_quant=double_quant, scale="mse").to("cpu")

    new = errors(weight, on_gpu)
    assert (new <= errors(weight, before.to("cpu"))).all()
    torch.testing.assert_close(new.sum(), errors(weight, on_cpu).sum(), rtol=1e-4, atol=0)


def test_the_largest_float32_is_kept() -> None:
    weight = normal(640).sign() * LARGEST

    quantized = quantize_nf4(weight, double_quant=False, scale="mse")

    assert torch.equal(quantized.dequantize(), weight)


@pytest.mark.parametrize(
    ("dtype", "double_quant"),
    [(torch.float16, False), (torch.float16, True), (torch.bfloat16, False)],  # no sum of bfloat16s
    ids=str,
)
def test_what_was_finite_in_its_dtype_comes_back_finite(
    dtype: torch.dtype, double_quant: bool
) -> None:
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(70, 64, generator=generator)
        share = 1 - torch.rand(70, 1, generator=generator) ** 4  # most close to the largest
        values *= share / values.abs().amax(dim=1, keepdim=True)
        weight = (values * torch.finfo(dtype).max).to(dtype)

        quantized = quantize_nf4(weight, scale="mse", double_quant=double_quant)

        assert weight.isfinite().all()
        assert quantized.dequantize().isfinite().all()


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match='scale must be "absmax" or "mse", not \'best\''):
        quantize_nf4(normal(64), scale="best")  # pyright: ignore[reportArgumentType]
    with pytest.raises(NonFiniteError, match="holds NaN or infinity"):
        quantize_nf4(torch.tensor([1.0, torch.inf]), scale="mse")
