"""The versions of what the numbers of a run come from."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import PackageNotFoundError, version

# The engine is part of this distribution, and in a checkout that was not installed nobody knows its version.
_DISTRIBUTIONS = {
    "qlora_core": "nibble",
    "torch": "torch",
    "triton": "triton",
    "transformers": "transformers",
}


def library_versions() -> dict[str, str | None]:
    """Name the version of each library, and of Python; None where it is not installed."""
    found = {name: _version(distribution) for name, distribution in _DISTRIBUTIONS.items()}
    return {"python": platform.python_version(), **found}


@functools.cache  # looking them up takes as long as writing some megabytes
def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
