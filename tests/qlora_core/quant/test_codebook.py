"""The tables of the storage format, against values derived elsewhere."""

import hashlib
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import torch

from qlora_core.quant.codebook import NF4_LEVELS, NF4_THRESHOLDS, dynamic_map


def test_the_levels_are_the_quantiles_of_a_normal_distribution() -> None:
    # QLoRA, appendix E: the quantiles of N(0, 1) at evenly spaced probabilities, eight on the
    # positive side and seven on the negative, plus an exact zero, scaled to [-1, 1].
    offset = 0.9677083
    normal = NormalDist()
    positive = [normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]

    levels = sorted([*positive, *negative, 0.0])

    expected = np.array(levels) / max(levels)
    np.testing.assert_allclose(NF4_LEVELS, expected, rtol=0, atol=2e-7)


def test_every_table_value_is_a_float32() -> None:
    for table in (NF4_LEVELS, NF4_THRESHOLDS, dynamic_map(signed=True)):
        assert [float(np.float32(value)) for value in table] == list(table)


def test_the_thresholds_are_the_midpoints_of_neighbouring_levels() -> None:
    middles = [(low + high) / 2 for low, high in pairwise(NF4_LEVELS)]

    assert list(NF4_THRESHOLDS) == [float(np.float32(middle)) for middle in middles]


def test_the_dynamic_maps_equal_the_published_ones_byte_for_byte() -> None:
    digests = {
        signed: hashlib.sha256(np.array(dynamic_map(signed=signed), np.float32).tobytes())
        for signed in (True, False)
    }

    assert digests[True].hexdigest().startswith("e732639a65f4")
    assert digests[False].hexdigest().startswith("305f002cc112")


def test_the_signed_map_has_127_negative_levels_an_exact_zero_and_128_positive_ones() -> None:
    levels = dynamic_map(signed=True)

    assert levels[127] == 0.0
    assert sum(level < 0 for level in levels) == 127
    assert sum(level > 0 for level in levels) == 128
    assert levels[-1] == 1.0
    assert round(levels[0], 6) == -0.992969


def test_the_maps_can_be_built_inside_a_meta_device_context() -> None:
    dynamic_map.cache_clear()

    with torch.device("meta"):
        levels = dynamic_map(signed=True)

    assert len(levels) == 256
