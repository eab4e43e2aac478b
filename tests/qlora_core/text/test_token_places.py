"""Places of tokens are held to a walk over all offsets."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers

from qlora_core.text.token_places import first_token

TEXTS = st.text(st.sampled_from("ab \n\té日🚀\u0301\u200b"), max_size=12)
AS_IT_IS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["plain", "composed", "without zero-width spaces"])
def some_tokenizer(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Tokenizer:
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.post_processor = None  # type: ignore[assignment]
    if request.param == "composed":
        copy.normalizer = normalizers.NFC()  # type: ignore[assignment]
    elif request.param != "plain":
        copy.normalizer = normalizers.Replace("\u200b", "")  # type: ignore[assignment]
    return copy


@AS_IT_IS
@given(text=TEXTS, place=st.integers(-1, 14))
def test_is_the_first_token_that_a_walk_finds(
    text: str, place: int, some_tokenizer: Tokenizer
) -> None:
    encoding = some_tokenizer.encode(text, add_special_tokens=False)
    offsets = encoding.offsets
    ending = [index for index, (_, end) in enumerate(offsets) if end > place]
    starting = [index for index, (start, _) in enumerate(offsets) if start >= place]

    assert first_token(encoding, ending_after=place) == min(ending, default=len(offsets))
    assert first_token(encoding, starting_from=place) == min(starting, default=len(offsets))
