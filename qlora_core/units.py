"""Sizes and times as people write and read them."""

from __future__ import annotations

import re

from qlora_core.errors import ConfigError

_BINARY = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_TOO_LARGE = 2**63
_UNITS = _BINARY | {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def duration(seconds: float) -> str:
    """Write a time as 0:07, 12:30 or 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(nbytes: int) -> str:
    """Write a size in GiB, or in MiB where it is small."""
    unit, name = (2**30, "GiB") if nbytes >= 2**30 else (2**20, "MiB")
    return f"{nbytes / unit:,.1f} {name}"


def read_size(text: str) -> int:
    """Read a size such as 24GiB, 80 GB or 1073741824.

    Raises:
        ConfigError: it is none, or more than any memory holds.
    """
    parts = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if parts is None or parts[2] not in _UNITS:
        raise ConfigError(f"a size is written such as 24GiB or 80GB, not {text!r}")
    nbytes = float(parts[1]) * _UNITS[parts[2]]
    if nbytes >= _TOO_LARGE:
        raise ConfigError("a size must be less than 8388608TiB")
    return int(nbytes)
