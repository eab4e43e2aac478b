"""Where an optimizer's moments live: one interface, and its simplest form, memory of the device itself.

Moments have a home, which is on the host where they are paged, and are on the device for a step only. A
step goes through them piece by piece; what it changes is at home again when `settle` has returned.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal, Protocol

import torch
from torch import Tensor

from qlora_core.ops.adamw.moments import Moments8, Moments32
from qlora_core.ops.adamw.settings import BLOCK_SIZE

Bits = Literal[8, 32]
Moments = Moments32 | Moments8


class StateMemory(Protocol):
    """Memory for the moments of a flat buffer; they begin as zeros.

    Every call is allowed at any time: those that there is nothing to do for do nothing.
    """

    @property
    def home(self) -> Moments:
        """The moments; on the host where they are paged, to be read and written after `settle` only."""
        ...

    @property
    def notice(self) -> str | None:
        """A sentence on why it is not the kind of memory that it should be."""
        ...

    @property
    def resident_bytes(self) -> int:
        """Bytes of moments on the device, by what was asked for; 0 from the moment a page-out begins."""
        ...

    def prefetch(self) -> None:
        """Begin to bring them to the device, after the work that is queued there now, and return at once."""
        ...

    def visit(self) -> Generator[tuple[slice, Moments]]:
        """Give which elements, whole tiles, and their moments on the device, ready for its current stream.

        Each piece goes home as soon as the next one is asked for, the last at the end. Where a step ends
        halfway it has to be closed.
        """
        ...

    def page_out(self) -> None:
        """Begin to give the device's room back, after the work that is queued there now."""
        ...

    def settle(self) -> None:
        """Page out, and wait until ``home`` holds what the steps so far have made."""
        ...


class PlainMemory:
    """Memory of the device, from which moments never go away."""

    notice = None

    def __init__(self, n: int, bits: Bits, device: torch.device) -> None:
        """Take memory for the moments of n elements, a multiple of 1024."""
        self._n = n
        buffer = torch.zeros(moment_bytes(n, bits), dtype=torch.uint8, device=device)
        self.home: Moments = moments_over(buffer, n, bits)
        self.resident_bytes = buffer.nbytes

    def prefetch(self) -> None:
        """Nothing."""

    def visit(self) -> Generator[tuple[slice, Moments]]:
        """Give everything."""
        yield slice(0, self._n), self.home

    def page_out(self) -> None:
        """Nothing."""

    def settle(self) -> None:
        """Nothing: whoever reads the moments waits for their device."""


def moment_bytes(n: int, bits: Bits) -> int:
    """Return the bytes of both moments of n elements, a multiple of 256: 8 each, or 2 and a 32nd."""
    return 8 * n if bits == 32 else 2 * n + 8 * (n // BLOCK_SIZE)


def moments_over(buffer: Tensor, n: int, bits: Bits) -> Moments:
    """Lay the moments of n elements, a multiple of 1024, over uint8 [at least `moment_bytes`], as views."""
    if bits == 32:
        first, second = buffer[: 8 * n].view(torch.float32).chunk(2)
        return Moments32(first, second)
    scales = buffer[2 * n : moment_bytes(n, bits)].view(torch.float32).chunk(2)
    return Moments8(buffer[:n], buffer[n : 2 * n], *scales)


def part_of(moments: Moments, place: slice) -> Moments:
    """Give the moments of some elements, whole blocks of 256, as views."""
    if isinstance(moments, Moments32):
        return Moments32(moments.mean[place], moments.square[place])
    blocks = slice(place.start // BLOCK_SIZE, place.stop // BLOCK_SIZE)
    return Moments8(
        moments.mean[place],
        moments.square[place],
        moments.mean_absmax[blocks],
        moments.square_absmax[blocks],
    )
