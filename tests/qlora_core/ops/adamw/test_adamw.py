"""A flat step of AdamW: against torch, bitsandbytes and numpy, and the Triton kernels against the reference."""

import math
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map

from qlora_core.errors import ConfigError, DtypeError, EngineError, LayoutError, ShapeError
from qlora_core.ops.adamw import cpu, ops, reference
from qlora_core.ops.adamw.codes import code_table, levels, thresholds
from qlora_core.ops.adamw.launch import launch_adamw
from qlora_core.ops.adamw.moments import Moments8, Moments32
from qlora_core.ops.adamw.settings import AdamWSettings, begin_step
from qlora_core.quant.codebook import dynamic_map

CPU = torch.device("cpu")
Moments = Moments32 | Moments8


def zeros(n: int, *, bits: int, device: str = "cpu") -> Moments:
    if bits == 32:
        return Moments32(torch.zeros(n, device=device), torch.zeros(n, device=device))
    codes = [torch.zeros(n, dtype=torch.uint8, device=device) for _ in range(2)]
    return Moments8(*codes, *[torch.zeros(n // 256, device=device) for _ in range(2)])


def drawn(n: int, seed: int) -> torch.Tensor:
    """Numbers of very different sizes, as gradients are."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (-6 * torch.rand(n, generator=generator))
    return torch.randn(n, generator=generator) * sizes


def copied(moments: Moments) -> Moments:
    parts = [getattr(moments, field.name).clone() for field in fields(moments)]
    return type(moments)(*parts)


def equal(first: Moments, second: Moments) -> bool:
    names = [field.name for field in fields(first)]
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_two_hundred_steps_in_32_bits_are_those_of_torch(weight_decay: float) -> None:
    values = torch.rand(2048, generator=torch.Generator().manual_seed(0)) + 0.5
    param = torch.nn.Parameter(values.clone())
    theirs = torch.optim.AdamW([param], lr=1e-3, weight_decay=weight_decay)
    moments, steps = zeros(2048, bits=32), torch.zeros(1)

    for step in range(200):
        gradient = drawn(2048, step)
        rate = 1e-3 / (step + 1)
        theirs.param_groups[0]["lr"] = rate
        param.grad = gradient.clone()
        theirs.step()
        settings = AdamWSettings(rate, weight_decay=weight_decay)
        ops.adamw_step(values, gradient, moments, steps, settings)

    torch.testing.assert_close(values, param.detach(), rtol=1e-6, atol=0)


def test_clipping_is_that_of_torch_and_leaves_the_gradient_as_it_was() -> None:
    gradient = drawn(1024, 1) * 50
    values, param = torch.ones(1024), torch.nn.Parameter(torch.ones(1024))
    theirs = torch.optim.AdamW([param], lr=1e-2, eps=1e-3, weight_decay=0)
    param.grad = gradient.clone()
    expected_norm = torch.nn.utils.clip_grad_norm_([param], 0.5)
    theirs.step()
    before = gradient.clone()

    norm = ops.adamw_step(
        values,
        gradient,
        zeros(1024, bits=32),
        torch.zeros(1),
        AdamWSettings(1e-2, eps=1e-3, max_grad_norm=0.5),
    )

    assert norm == pytest.approx(float(expected_norm))
    torch.testing.assert_close(values, param.detach(), rtol=1e-6, atol=0)
    assert torch.equal(gradient, before)


def test_a_step_in_8_bits_is_that_of_bitsandbytes_but_for_the_steps_of_its_table() -> None:
    n = 8192
    maps = [create_dynamic_map(signed=signed) for signed in (True, False)]
    values, moments, steps = torch.ones(n), zeros(n, bits=8), torch.zeros(1)
    assert isinstance(moments, Moments8)

    for step in range(1, 21):
        gradient = drawn(n, step)
        old_mean = reference.decode(moments.mean, moments.mean_absmax, signed=True)
        old_square = reference.decode(moments.square, moments.square_absmax, signed=False)
        # Both begin each step from the same codes.
        theirs, expected = copied(moments), values.clone()
        assert isinstance(theirs, Moments8)
        torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
            "adam", gradient, expected, theirs.mean, theirs.square, 0.9, 0.999, 0.0, 0.0, 1e-8,
            step, 1e-3, *maps, theirs.mean_absmax, theirs.square_absmax, 0.1, 1.0, False,
        )  # fmt: skip
        ops.adamw_step(values, gradient, moments, steps, AdamWSettings(1e-3, weight_decay=0.1))

        torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(moments.mean_absmax, theirs.mean_absmax, rtol=1e-6, atol=0)
        torch.testing.assert_close(moments.square_absmax, theirs.square_absmax, rtol=1e-6, atol=0)
        _check_codes(
            moments.mean, theirs.mean, maps[0], 0.9 * old_mean + 0.1 * gradient, theirs.mean_absmax
        )
        _check_codes(
            moments.square,
            theirs.square,
            maps[1],
            0.999 * old_square + 0.001 * gradient**2,
            theirs.square_absmax,
        )


def _check_codes(
    ours: torch.Tensor,
    theirs: torch.Tensor,
    levels_: torch.Tensor,
    moment: torch.Tensor,
    absmax: torch.Tensor,
) -> None:
    """Codes differ only where a threshold is within a step of the table of bitsandbytes' CPU path.

    It rounds scaled numbers to one of 65536 from -1 to 1 before it looks for the level.
    """  # fmt: skip
    scaled = (moment.view(-1, 256) / absmax[:, None]).view(-1)
    to_theirs, to_ours = ((levels_[codes.int()] - scaled).abs() for codes in (theirs, ours))
    table_step = 2 / 65535
    assert (to_theirs <= to_ours + 2 * table_step + 1e-7).all()
    large = scaled.abs() > 0.01
    assert large.sum() > 500
    assert (ours != theirs)[large].float().mean() < 0.02


@pytest.mark.parametrize("signed", [True, False])
def test_a_code_is_that_of_the_nearest_level_found_by_brute_force(*, signed: bool) -> None:
    moment = drawn(2048, 3)
    moment = moment if signed else moment**2
    moment[256:512] = 0

    codes, absmax = reference.encode(moment, signed=signed)

    ours = np.array(dynamic_map(signed=signed), dtype=np.float64)
    blocks = moment.double().numpy().reshape(-1, 256)
    largest = np.abs(blocks).max(axis=1)
    assert absmax.tolist() == largest.tolist()
    scaled = np.divide(blocks, largest[:, None], where=largest[:, None] > 0, out=blocks * 0)
    distances = np.abs(scaled[:, :, None] - ours)
    nearest = distances.min(axis=2)
    chosen = np.take_along_axis(distances, codes.numpy().reshape(-1, 256, 1).astype(int), 2)
    kept_positive = (codes.numpy().reshape(-1, 256) == 1) & (not signed)
    assert ((chosen[:, :, 0] <= nearest + 1e-7) | kept_positive).all()
    assert ((codes > 0) | (moment <= 0)).all() or signed
    assert not reference.decode(codes, absmax, signed=signed)[256:512].any()


def test_a_small_element_that_loses_its_gradient_makes_no_leap() -> None:
    gradient = torch.zeros(1024)
    gradient[0], gradient[1] = 1.0, 1e-4
    values, moments, steps = torch.zeros(1024), zeros(1024, bits=8), torch.zeros(1)

    for _ in range(2):
        ops.adamw_step(values, gradient, moments, steps, AdamWSettings(1e-3))
        gradient[1] = 0

    # A second moment that was rounded to zero would make the second step 0.1 * 1e-4 / 1e-8 times too long.
    assert values.abs().max() < 3e-3


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1e30])
def test_a_gradient_that_is_not_finite_changes_nothing(
    bits: int, wrong: float, kernel_device: str
) -> None:
    values = drawn(2048, 1).to(kernel_device)
    moments = zeros(2048, bits=bits, device=kernel_device)
    steps = torch.zeros(3, device=kernel_device)
    settings = AdamWSettings(1e-3, weight_decay=0.1, max_grad_norm=1.0)
    ops.adamw_step(values, drawn(2048, 2).to(kernel_device), moments, steps, settings)
    expected, expected_moments = values.clone(), copied(moments)
    gradient = drawn(2048, 3).to(kernel_device)
    gradient[1999] = wrong
    gradient[3] = -wrong

    norm = torch.linalg.vector_norm(gradient)
    scalars = begin_step(steps, norm, settings)
    takes = [reference.adamw_step, launch_adamw]
    if kernel_device == "cpu":
        takes.append(cpu.adamw_step)
    for take in takes:
        take(values, gradient, moments, scalars, settings)

    assert not torch.isfinite(ops.adamw_step(values, gradient, moments, steps, settings))
    assert torch.equal(values, expected)
    assert equal(moments, expected_moments)
    assert steps.tolist() == [1, 1, 1]


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(
    "make",
    [
        drawn,
        lambda n, _: torch.zeros(n),
        lambda n, seed: torch.where(torch.arange(n) < 300, 0.0, drawn(n, seed)),
        lambda n, seed: drawn(n, seed) * 1e16,
        lambda n, seed: drawn(n, seed) * 1e-20,  # squares of it are subnormal or zero
    ],
    ids=["usual", "zero", "zero blocks", "huge", "tiny"],
)
def test_the_kernel_equals_the_reference(
    bits: int, make: Callable[[int, int], torch.Tensor], kernel_device: str
) -> None:
    n = 3 * 1024
    expected = drawn(n, 99).to(kernel_device)
    actual = expected.clone()
    expected_moments = zeros(n, bits=bits, device=kernel_device)
    moments, steps = copied(expected_moments), torch.zeros(2, device=kernel_device)
    settings = AdamWSettings(1e-2, weight_decay=0.1, max_grad_norm=2.0)

    for step in range(3):
        gradient = make(n, step).to(kernel_device)
        scalars = begin_step(steps, torch.linalg.vector_norm(gradient), settings)
        reference.adamw_step(expected, gradient, expected_moments, scalars, settings)
        launch_adamw(actual, gradient, moments, scalars, settings)

        assert torch.equal(actual, expected)
        assert equal(moments, expected_moments)
    assert torch.isfinite(actual).all()


def test_the_kernel_finds_the_codes_of_numbers_on_and_beside_all_thresholds(
    kernel_device: str,
) -> None:
    bounds = thresholds(CPU, signed=True)[:-1]
    beside = [torch.nextafter(bounds, torch.tensor(sign * math.inf)) for sign in (1, -1)]
    numbers = torch.cat((bounds, *beside, levels(CPU, signed=True), torch.zeros(1024)))[:1024]
    # A 1 in every block is its largest, and without a memory the first moment is the gradient.
    blocks = numbers.view(-1, 256)
    gradient = torch.cat((blocks[:, :255], torch.ones(4, 1)), dim=1).view(-1).to(kernel_device)
    settings = AdamWSettings(0.0, beta1=0.0, beta2=0.0)
    moments = zeros(1024, bits=8, device=kernel_device)
    steps = torch.zeros(1, device=kernel_device)
    scalars = begin_step(steps, torch.linalg.vector_norm(gradient), settings)

    launch_adamw(torch.zeros_like(gradient), gradient, moments, scalars, settings)

    expected, absmax = reference.encode(gradient, signed=True)
    assert isinstance(moments, Moments8)
    assert absmax.tolist() == [1.0] * 4
    assert torch.equal(moments.mean, expected)


@pytest.mark.parametrize("bits", [32, 8])
def test_the_path_of_cpus_equals_the_reference_over_several_chunks(bits: int) -> None:
    n = 2 * 64 * 1024 + 3 * 1024
    expected = drawn(n, 99)
    actual, steps = expected.clone(), torch.zeros(1)
    expected_moments = zeros(n, bits=bits)
    moments = copied(expected_moments)
    settings = AdamWSettings(1e-2, weight_decay=0.1, max_grad_norm=2.0)

    for step in range(3):
        gradient = torch.where(torch.arange(n) < 300, 0.0, drawn(n, step))
        scalars = begin_step(steps, torch.linalg.vector_norm(gradient), settings)
        reference.adamw_step(expected, gradient, expected_moments, scalars, settings)
        cpu.adamw_step(actual, gradient, moments, scalars, settings)

    assert torch.equal(actual, expected)
    assert equal(moments, expected_moments)


@pytest.mark.parametrize("signed", [True, False])
def test_the_tables_of_cpus_find_the_codes_on_and_beside_all_thresholds(*, signed: bool) -> None:
    bounds = thresholds(CPU, signed=signed)[:-1]
    beside = [torch.nextafter(bounds, torch.tensor(sign * math.inf)) for sign in (1, -1)]
    numbers = torch.cat((bounds, *beside, levels(CPU, signed=signed)))[:1020]
    blocks = torch.cat((numbers.view(4, 255), torch.ones(4, 1)), dim=1)

    codes, absmax = cpu.encode(blocks.view(-1), signed=signed)

    expected, expected_absmax = reference.encode(blocks.view(-1), signed=signed)
    assert torch.equal(codes, expected)
    assert absmax.tolist() == expected_absmax.tolist() == [1.0] * 4


@pytest.mark.parametrize("signed", [True, False])
def test_no_number_is_more_than_one_code_beyond_the_tables(*, signed: bool) -> None:
    found = code_table(CPU, signed=signed).int()

    # From one half to the next at most one threshold is passed.
    n = found.numel() // 2
    assert found[:n].diff().max() == 1
    if signed:
        assert found[n:].diff().min() == -1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be a number of at least 0, not -1.0"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"weight_decay": math.inf}, "weight_decay"),
        ({"beta1": 1.0}, "beta1 must be from 0 to below 1"),
        ({"beta2": -0.1}, "beta2"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        AdamWSettings(**{"learning_rate": 0.1} | settings)


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"values": torch.zeros(1000)}, ShapeError, "multiple of 1024"),
        ({"values": torch.zeros(0)}, ShapeError, "multiple of 1024"),
        ({"values": torch.zeros(1024).half()}, DtypeError, "values"),
        ({"gradients": torch.zeros(2048)}, ShapeError, "gradients"),
        ({"gradients": torch.zeros(2048)[::2]}, LayoutError, "gradients must be contiguous"),
        ({"moments": zeros(2048, bits=8)}, ShapeError, "mean"),
        ({"steps": torch.zeros(0)}, ShapeError, "steps"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    changes: dict[str, torch.Tensor | Moments], error: type[EngineError], told: str
) -> None:
    arguments = {
        "values": torch.zeros(1024),
        "gradients": torch.zeros(1024),
        "moments": zeros(1024, bits=8),
        "steps": torch.zeros(1),
    }

    with pytest.raises(error, match=told):
        ops.adamw_step(**arguments | changes, settings=AdamWSettings(0.1))  # pyright: ignore[reportArgumentType]
