"""What a file says is shown in a message, whatever it says."""

import pytest

from qlora_core.quoting import quoted


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("model.norm.weight", "model.norm.weight"),
        ("näme", "näme"),
        (["a", 3], "['a', 3]"),
        (None, "None"),
        ("a\nb\x1b[2J", "a\\nb\\x1b[2J"),
        ("half \ud800", "half \\ud800"),
    ],
)
def test_a_value_is_one_printable_line(value: object, shown: str) -> None:
    assert quoted(value) == shown
    assert quoted(value).encode()


def test_a_long_value_is_cut() -> None:
    assert quoted("x" * 200) == "x" * 200
    assert quoted("x" * 10**6) == "x" * 200 + "…"
    assert quoted(list(range(10**4)), 5) == "[0, 1…"
