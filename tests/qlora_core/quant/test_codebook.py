"""The tables of the storage formats, against the published ones and bitsandbytes."""

import hashlib
import math

import numpy as np
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, get_4bit_type, quantize_4bit

from qlora_core.quant.codebook import (
    E2M1_LEVELS,
    FP4_LEVELS,
    NF4_LEVELS,
    NF4_THRESHOLDS,
    ascending_codes,
    dynamic_map,
    thresholds_between,
)
from tests.qlora_core.quant import brute_force


def test_the_derived_levels_are_the_published_ones_to_the_last_bit() -> None:
    assert list(NF4_LEVELS) == [float(level) for level in brute_force.LEVELS]


def test_each_level_stands_for_an_equal_share_of_a_normal_distribution() -> None:
    # The middles of neighbouring levels cut N(0, 1), in units of the largest level, in parts of
    # nearly one size; the outermost ones also hold the tails.
    outermost = 1.8481
    cuts = [-math.inf, *(outermost * middle for middle in NF4_THRESHOLDS), math.inf]

    shares = np.diff([(1 + math.erf(cut / math.sqrt(2))) / 2 for cut in cuts])

    assert shares[1:-1].min() > 0.055
    assert shares[1:-1].max() < 0.076


def test_every_table_value_is_a_float32() -> None:
    for table in (NF4_LEVELS, NF4_THRESHOLDS, FP4_LEVELS, E2M1_LEVELS, dynamic_map()):
        assert [float(np.float32(value)) for value in table] == list(table)


def test_the_thresholds_are_the_midpoints_of_neighbouring_levels() -> None:
    levels = np.array(NF4_LEVELS, np.float32)

    assert list(NF4_THRESHOLDS) == ((levels[:-1] + levels[1:]) / np.float32(2)).tolist()


@pytest.mark.parametrize(("kind", "levels"), [("nf4", NF4_LEVELS), ("fp4", FP4_LEVELS)])
def test_bitsandbytes_changes_codes_at_the_same_float32(
    kind: str, levels: tuple[float, ...]
) -> None:
    codes = ascending_codes(levels)
    on = np.array(thresholds_between(levels), np.float32)
    below = np.nextafter(on, np.float32(-2))
    above = np.nextafter(on, np.float32(2))
    values = torch.from_numpy(np.concatenate([below, on, above, [1.0], np.zeros(18)])).float()

    packed, _ = quantize_4bit(values, blocksize=64, quant_type=kind)

    theirs = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 0x0F), dim=1).view(-1).tolist()
    assert theirs[:15] == list(codes[:15])
    assert theirs[15:30] == list(codes[:15])
    assert theirs[30:45] == list(codes[1:])


@pytest.mark.parametrize(("kind", "levels"), [("nf4", NF4_LEVELS), ("fp4", FP4_LEVELS)])
def test_bitsandbytes_has_the_same_levels(kind: str, levels: tuple[float, ...]) -> None:
    assert get_4bit_type(kind, device="cpu").tolist() == list(levels)


def test_four_bit_floats_have_a_sign_two_bits_of_exponent_and_one_of_mantissa() -> None:
    def value(code: int) -> float:
        sign, exponent, mantissa = code >> 3, code >> 1 & 0b11, code & 1
        # Bias 1; exponent 0 has no leading one.
        size = 2 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
        return -size if sign else size

    expected = np.array([value(code) for code in range(16)], np.float32) / np.float32(6)

    assert list(E2M1_LEVELS) == expected.tolist()
    # bitsandbytes' exponents stand for other powers of two, and its subnormal is smaller.
    magnitudes = np.array([0, 1 / 16, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
    assert list(FP4_LEVELS) == [*magnitudes.tolist(), *(-magnitudes + 0).tolist()]


def test_midpoints_take_the_levels_in_order_whatever_the_codes() -> None:
    levels = (0.5, -1.0, 0.0, 1.0, 0.0)

    assert ascending_codes(levels) == (1, 2, 4, 0, 3)
    assert thresholds_between(levels) == (-0.5, 0.0, 0.25, 0.75)


def test_the_dynamic_maps_equal_the_published_ones_byte_for_byte() -> None:
    digests = {
        signed: hashlib.sha256(np.array(dynamic_map(signed=signed), np.float32).tobytes())
        for signed in (True, False)
    }

    assert digests[True].hexdigest().startswith("e732639a65f4")
    assert digests[False].hexdigest().startswith("305f002cc112")


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_maps_are_those_of_bitsandbytes(signed: bool) -> None:
    theirs = create_dynamic_map(signed=signed)

    # On a CPU that does not fuse multiplication and addition, theirs has other last bits.
    tolerance = 0.0 if torch.backends.cpu.get_cpu_capability() != "DEFAULT" else 1e-6
    ours = torch.tensor(dynamic_map(signed=signed))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)


def test_the_signed_map_has_127_negative_levels_an_exact_zero_and_128_positive_ones() -> None:
    levels = dynamic_map(signed=True)

    assert levels[127] == 0.0
    assert sum(level < 0 for level in levels) == 127
    assert sum(level > 0 for level in levels) == 128
    assert levels[-1] == 1.0
    assert round(levels[0], 6) == -0.992969


def test_the_unsigned_map_has_an_exact_zero_and_255_positive_levels() -> None:
    levels = dynamic_map(signed=False)

    assert levels[0] == 0.0
    assert sum(level > 0 for level in levels) == 255
    assert levels[-1] == 1.0
