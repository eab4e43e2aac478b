"""A group of result rows: the smallest thing that is run and kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Group:
    """Something to run on a device.

    Attributes:
        name: unique; its first word is the part it belongs to.
        run: gives the rows. A key that begins with ``wrong`` counts what must be nought.
    """

    name: str
    run: Callable[[], Rows]

    @property
    def part(self) -> str:
        """What `--parts` selects by."""
        return self.name.split()[0]
