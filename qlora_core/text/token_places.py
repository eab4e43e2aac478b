"""Which token of an encoded text stands where, without a list of all offsets: making one takes a fifth of tokenizing."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from tokenizers import Encoding


def first_token(
    encoding: Encoding, *, ending_after: int | None = None, starting_from: int | None = None
) -> int:
    """Return the first token that ends after a character, or that starts from one on; the number of tokens if none does.

    Args:
        encoding: with offsets that rise, as without a post-processor they do.
        ending_after: a place between characters; give this or
        starting_from: a place between characters.
    """
    place = ending_after if starting_from is None else starting_from
    if place is None:
        raise TypeError("give one of the two places")
    if len(encoding) == 0 or place >= encoding.token_to_chars(len(encoding) - 1)[1]:  # type: ignore[index]
        return len(encoding)
    # A character may have no token of its own (a normalizer dropped it), or several.
    token = encoding.char_to_token(place) if place >= 0 else None
    if token is None:
        if starting_from is None:
            return bisect_right(encoding.offsets, place, key=lambda offset: offset[1])
        return bisect_left(encoding.offsets, place, key=lambda offset: offset[0])
    if starting_from is None:
        return token
    while token < len(encoding) and encoding.token_to_chars(token)[0] < place:  # type: ignore[index]
        token += 1
    return token
