"""Sizes and times as people write and read them."""

import pytest

from qlora_core.errors import ConfigError
from qlora_core.units import duration, read_size, size


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (7.4, "0:07"), (750, "12:30"), (11_100, "3:05:00")]
)
def test_times_are_written_as_on_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes_are_in_the_unit_that_suits_them() -> None:
    assert size(600 * 2**20) == "600.0 MiB"
    assert size(3 * 2**29) == "1.5 GiB"
    assert size(150 * 2**10) == "0.1 MiB"


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24GiB", 24 * 2**30),
        ("80 GB", 80 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("512MiB", 2**29),
        ("1000", 1000),
        ("7 B", 7),
    ],
)
def test_a_size_is_read_in_its_unit(text: str, nbytes: int) -> None:
    assert read_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "24 gigs", "1e9", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="a size is written such as 24GiB"):
        read_size(text)


@pytest.mark.parametrize("text", ["9" * 400, "8388608TiB"], ids=len)
def test_more_than_any_memory_holds_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="less than 8388608TiB"):
        read_size(text)
