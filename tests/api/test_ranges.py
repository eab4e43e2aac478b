"""What a `Range` header asks for, held to slicing."""

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.ranges import Span, not_modified, wanted

ETAG = '"tag"'


@given(st.integers(1, 40), st.integers(0, 50), st.none() | st.integers(0, 50))
def test_first_and_last_are_both_included(size: int, first: int, last: int | None) -> None:
    content = bytes(range(size))

    span = wanted(size, ETAG, f"bytes={first}-{'' if last is None else last}", None)

    if last is not None and last < first:
        assert span == "all"
    elif first >= size:
        assert span == "unsatisfiable"
    else:
        assert isinstance(span, Span)
        expected = content[first:] if last is None else content[first : last + 1]
        assert content[span.start : span.end] == expected
        assert span.content_range == f"bytes {expected[0]}-{expected[-1]}/{size}"


@given(st.integers(1, 40), st.integers(0, 50))
def test_a_suffix_is_the_last_bytes(size: int, count: int) -> None:
    span = wanted(size, ETAG, f"bytes=-{count}", None)

    if count == 0:
        assert span == "unsatisfiable"
    else:
        assert isinstance(span, Span)
        assert (span.end, span.end - span.start) == (size, min(count, size))


@pytest.mark.parametrize(
    "header", [None, "", "bytes", "bytes=", "bytes=-", "bytes=a-b", "bytes=0-1,2-3", "items=0-1",
               "bytes=" + "9" * 30 + "-", "bytes=1--2", "bytes=5-4", "bytes=²-"],
)  # fmt: skip
def test_what_is_no_single_range_of_bytes_is_ignored(header: str | None) -> None:
    assert wanted(10, ETAG, header, None) == "all"


@pytest.mark.parametrize(
    ("if_range", "expected"),
    [(None, "part"), (ETAG, "part"), ('"other"', "all"), (f"W/{ETAG}", "all"), ("x", "all")],
)
def test_a_range_counts_only_for_the_same_strong_tag(
    if_range: str | None, expected: Literal["part", "all"]
) -> None:
    span = wanted(10, ETAG, "bytes=0-1", if_range)

    assert (span == "all") == (expected == "all")


@pytest.mark.parametrize(
    ("header", "known"),
    [(None, False), (ETAG, True), (f"W/{ETAG}", True), (f'"a",{ETAG}', True), ("*", True),
     ('"other"', False), ("", False), ("tag", False)],
)  # fmt: skip
def test_a_known_tag_is_recognised(header: str | None, known: bool) -> None:
    assert not_modified(ETAG, header) is known
