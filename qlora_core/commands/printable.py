"""A model's words as a terminal may see them: what could steer it is taken out."""

from __future__ import annotations

import unicodedata

_KEPT = "\n\t"


def printable(text: str) -> str:
    """Leave out control characters, but for line ends and tabs."""
    return "".join(one for one in text if one in _KEPT or unicodedata.category(one) != "Cc")
