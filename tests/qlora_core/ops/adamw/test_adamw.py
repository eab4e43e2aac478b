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


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("max_grad_norm", [0.5, 1e9])
@pytest.mark.parametrize("divisor", [1.0, 3.0, 20_000.0])
def test_dividing_and_clipping_on_the_way_are_torchs_done_before(
    divisor: float, max_grad_norm: float, bits: int, kernel_device: str
) -> None:
    gradient = drawn(1024, 1) * 50 * divisor
    values = torch.ones(1024, device=kernel_device)
    param = torch.nn.Parameter(torch.ones(1024))
    theirs = torch.optim.AdamW([param], lr=1e-2, eps=1e-3, weight_decay=0)
    param.grad = gradient / divisor
    expected_norm = torch.nn.utils.clip_grad_norm_([param], max_grad_norm)
    theirs.step()

    norm = ops.adamw_step(
        values,
        gradient.to(kernel_device),
        zeros(1024, bits=bits, device=kernel_device),
        torch.zeros(1, device=kernel_device),
        AdamWSettings(1e-2, eps=1e-3, max_grad_norm=max_grad_norm, gradient_divisor=divisor),
    )

    assert float(norm) == pytest.approx(float(expected_norm))
    torch.testing.assert_close(values.cpu(), param.detach(), rtol=1e-6, atol=0)


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

    scalars = begin_step(steps, torch.linalg.vector_norm(gradient), settings)
    for take in (reference.adamw_step, launch_adamw):
        take(values, gradient, moments, scalars, settings)

    assert not torch.isfinite(ops.adamw_step(values, gradient, moments, steps, settings))
    assert torch.equal(values, expected)
    assert equal(moments, expected_moments)
    assert steps.tolist() == [1, 1, 1]


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("loss", [math.nan, -math.inf])
def test_a_loss_that_is_not_finite_changes_nothing_under_a_finite_gradient(
    bits: int, loss: float, kernel_device: str
) -> None:
    values = drawn(1024, 1).to(kernel_device)
    moments, steps = (
        zeros(1024, bits=bits, device=kernel_device),
        torch.zeros(1, device=kernel_device),
    )
    gradient = drawn(1024, 2).to(kernel_device)
    settings = AdamWSettings(1e-3, weight_decay=0.1)
    told = torch.tensor(1.5, device=kernel_device)
    ops.adamw_step(values, gradient.clone(), moments, steps, settings, loss=told)
    expected, expected_moments = values.clone(), copied(moments)

    norm = ops.adamw_step(values, gradient, moments, steps, settings, loss=told * loss)

    assert torch.isfinite(norm)
    assert steps.tolist() == [1]
    assert torch.equal(values, expected)
    assert equal(moments, expected_moments)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [32, 8])
def test_the_kernel_writes_copies_that_are_the_values_rounded_to_nearest_even(
    bits: int, dtype: torch.dtype, kernel_device: str
) -> None:
    values = drawn(2048, 99).to(kernel_device)
    # Halfway between two numbers of bfloat16 and of float16, with an even and with an odd one below.
    values[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, -1 - 3 * 2**-11])
    gradient = drawn(2048, 1).to(kernel_device)
    gradient[:4] = 0
    copies = torch.full((2048,), torch.nan, dtype=dtype, device=kernel_device)
    without, moments = values.clone(), zeros(2048, bits=bits, device=kernel_device)
    others, steps = copied(moments), torch.zeros(1, device=kernel_device)
    settings = AdamWSettings(1e-2)
    scalars = begin_step(steps, torch.linalg.vector_norm(gradient), settings)

    launch_adamw(values, gradient, moments, scalars, settings, copies)

    launch_adamw(without, gradient, others, scalars, settings)
    assert torch.equal(copies, values.to(dtype))
    assert torch.equal(values, without)
    assert equal(moments, others)
    even = [1.0, 1 + 2**-6, 1.0, -1.0] if dtype == torch.bfloat16 else [1 + 2**-8, 1 + 3 * 2**-8, 1.0, -1 - 2**-9]  # fmt: skip
    assert copies[:4].tolist() == even


@pytest.mark.parametrize("bits", [32, 8])
def test_a_step_leaves_copies_that_are_the_values_rounded_and_alone_where_nothing_changes(
    bits: int, kernel_device: str
) -> None:
    values, moments = drawn(3072, 1).to(kernel_device), zeros(3072, bits=bits, device=kernel_device)
    steps = torch.zeros(1, device=kernel_device)
    copies = torch.full((3072,), torch.nan, dtype=torch.bfloat16, device=kernel_device)
    gradient = drawn(3072, 2).to(kernel_device)

    ops.adamw_step(values, gradient, moments, steps, AdamWSettings(1e-2), copies=copies)

    assert torch.equal(copies, values.bfloat16())
    gradient[7] = torch.nan
    copies.fill_(3.0)
    ops.adamw_step(values, gradient, moments, steps, AdamWSettings(1e-2), copies=copies)
    assert (copies == 3.0).all()


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


def test_in_8_bits_the_path_of_cpus_equals_the_reference_over_several_chunks() -> None:
    n = 2 * 64 * 1024 + 3 * 1024
    expected = drawn(n, 99)
    actual, steps = expected.clone(), torch.zeros(1)
    expected_moments = zeros(n, bits=8)
    moments = copied(expected_moments)
    assert isinstance(moments, Moments8)
    settings = AdamWSettings(1e-2, weight_decay=0.1, max_grad_norm=2.0)

    for step in range(3):
        gradient = torch.where(torch.arange(n) < 300, 0.0, drawn(n, step))
        scalars = begin_step(steps, torch.linalg.vector_norm(gradient), settings)
        reference.adamw_step(expected, gradient, expected_moments, scalars, settings)
        cpu.adamw_step_8(actual, gradient, moments, scalars, settings)

    assert torch.equal(actual, expected)
    assert equal(moments, expected_moments)


@pytest.mark.parametrize("scale", [1.0, 0.0, 1e16, 1e-20], ids=["usual", "zero", "huge", "tiny"])
def test_in_32_bits_the_path_of_cpus_is_the_reference_up_to_rounding(scale: float) -> None:
    n = 5 * 1024
    expected = drawn(n, 99)
    values, steps = expected.clone(), torch.zeros(1)
    expected_moments, moments = zeros(n, bits=32), zeros(n, bits=32)
    assert isinstance(expected_moments, Moments32)
    assert isinstance(moments, Moments32)
    settings = AdamWSettings(1e-2, weight_decay=0.1, max_grad_norm=2.0, gradient_divisor=7.0)

    for step in range(3):
        gradient = torch.where(torch.arange(n) < 300, 0.0, drawn(n, step) * scale)
        norm = torch.linalg.vector_norm(gradient) / 7
        scalars = begin_step(steps, norm, settings)
        reference.adamw_step(expected, gradient, expected_moments, scalars, settings)
        cpu.adamw_step_32(values, gradient, moments, steps, scalars, settings)

    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(moments.mean, expected_moments.mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(moments.square, expected_moments.square, rtol=2e-6, atol=1e-12)
    assert steps.tolist() == [3]


@pytest.mark.parametrize("bits", [32, 8])
def test_on_cpus_neither_threads_nor_where_the_buffer_is_cut_change_a_bit(bits: int) -> None:
    n, threads = 37 * 1024, torch.get_num_threads()
    settings = AdamWSettings(1e-2, weight_decay=0.1, gradient_divisor=3.0)
    results: list[tuple[torch.Tensor, Moments]] = []

    try:
        for count, cut in ((1, n), (2, n), (3, n), (2, 1024)):
            torch.set_num_threads(count)
            values, moments = drawn(n, 1), zeros(n, bits=bits)
            for step in range(1, 3):
                gradient, steps = drawn(n, step), torch.full((1,), float(step))
                scalars = begin_step(steps - 1, torch.ones(()), settings)
                for place in range(0, n, cut):
                    _take_on_cpu(
                        slice(place, place + cut),
                        values,
                        gradient,
                        moments,
                        steps,
                        scalars,
                        settings,
                    )
            results.append((values, moments))
    finally:
        torch.set_num_threads(threads)

    for values, moments in results[1:]:
        assert torch.equal(values, results[0][0])
        assert equal(moments, results[0][1])


def _take_on_cpu(
    place: slice,
    values: torch.Tensor,
    gradient: torch.Tensor,
    moments: Moments,
    steps: torch.Tensor,
    scalars: torch.Tensor,
    settings: AdamWSettings,
) -> None:
    given = values[place], gradient[place]
    if isinstance(moments, Moments32):
        cut = Moments32(moments.mean[place], moments.square[place])
        cpu.adamw_step_32(*given, cut, steps, scalars, settings)
        return
    blocks = slice(place.start // 256, place.stop // 256)
    scales = moments.mean_absmax[blocks], moments.square_absmax[blocks]
    cut = Moments8(moments.mean[place], moments.square[place], *scales)
    cpu.adamw_step_8(*given, cut, scalars, settings)


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
        ({"gradient_divisor": 0.0}, "gradient_divisor must be a number above 0, not 0.0"),
        ({"gradient_divisor": math.inf}, "gradient_divisor"),
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
        ({"copies": torch.zeros(1024)}, DtypeError, "copies must be float16 or bfloat16"),
        ({"copies": torch.zeros(2048).half()}, ShapeError, "copies must be"),
        ({"copies": torch.zeros(2048).half()[::2]}, LayoutError, "copies must be contiguous"),
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
