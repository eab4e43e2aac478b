"""Paged moments by explicit copies between pinned host memory and two pieces of device memory.

While the step is at one piece, the piece before it goes home and the piece after it comes, so the device
never holds more than two pieces, however large the state is. Bringing all of it before the step would hide
all copies behind the backward, but it would take the room of the whole state exactly when activations take
the most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from qlora_core.ops.adamw.settings import TILE
from qlora_core.optim.side_stream import SideStream
from qlora_core.optim.state_memory import Bits, Moments, moment_bytes, moments_over, part_of

# So large that a copy takes some hundred times what it takes to start one.
_PIECE_BYTES = 32 * 1024**2
_ROOMS = 2


@dataclass(frozen=True)
class _Arrival:
    """A piece on its way to the device.

    Attributes:
        place: which elements it holds.
        room: device memory of a piece; the last piece may leave some of it unused.
        wait: lets the current stream wait until it is there.
    """

    place: slice
    room: Tensor
    wait: Callable[[], None]


class PinnedMemory:
    """Moments at home in pinned host memory; on a CPU in ordinary memory, and copied as on a GPU."""

    def __init__(
        self,
        n: int,
        bits: Bits,
        device: torch.device,
        *,
        notice: str | None = None,
        piece_bytes: int = _PIECE_BYTES,
    ) -> None:
        """Take host memory for the moments of n elements, a multiple of 1024.

        Args:
            n: how many elements.
            bits: of a moment.
            device: where steps are taken.
            notice: what `StateMemory.notice` says.
            piece_bytes: of each of the two pieces on the device, rounded down to whole tiles.
        """
        self.notice = notice
        self._bits: Bits = bits
        self._device = device
        on_gpu = device.type == "cuda"
        home = torch.zeros(moment_bytes(n, bits), dtype=torch.uint8, pin_memory=on_gpu)
        self.home: Moments = moments_over(home, n, bits)
        self._piece = min(n, max(1, piece_bytes // moment_bytes(TILE, bits)) * TILE)
        self._places = [slice(at, min(at + self._piece, n)) for at in range(0, n, self._piece)]
        self._coming, self._going = SideStream(device), SideStream(device)
        self._arrivals: deque[_Arrival] = deque()
        self._rooms: list[Tensor] = []

    @property
    def resident_bytes(self) -> int:
        """Bytes of the pieces' memory on the device."""
        return sum(room.nbytes for room in self._rooms)

    def prefetch(self) -> None:
        """Begin to bring the first two pieces."""
        if self._rooms:
            return
        size = moment_bytes(self._piece, self._bits)
        first = self._places[:_ROOMS]
        # All of it before anything is begun: there may be no room.
        self._rooms = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in first]
        for place, room in zip(first, self._rooms, strict=True):
            self._arrivals.append(self._bring(place, room))

    def visit(self) -> Generator[tuple[slice, Moments]]:
        """Give piece after piece, copying the others meanwhile."""
        self.prefetch()
        to_come = iter(self._places[_ROOMS:])
        try:
            while self._arrivals:
                arrival = self._arrivals.popleft()
                arrival.wait()
                yield arrival.place, self._in(arrival.room, arrival.place)
                self._send_home(arrival)
                following = next(to_come, None)
                if following is not None:
                    self._arrivals.append(self._bring(following, arrival.room))
        finally:
            # Also where a step failed in between: the next one has to begin at the first piece.
            self.page_out()

    def page_out(self) -> None:
        """Give the pieces' memory back when their copies are done; those not visited go unchanged."""
        for stream in (self._coming, self._going):
            stream.keep(self._rooms)
        self._arrivals.clear()
        self._rooms.clear()

    def settle(self) -> None:
        """Page out, and wait for the copies."""
        self.page_out()
        self._coming.synchronize()
        self._going.synchronize()

    def _bring(self, place: slice, room: Tensor) -> _Arrival:
        # New room may still be in use on the one; on the other a piece may be leaving it, and writing home.
        self._coming.wait_for_current()
        self._coming.wait_for(self._going)
        with self._coming.work():
            _copy(part_of(self.home, place), self._in(room, place))
        return _Arrival(place, room, self._coming.mark())

    def _send_home(self, arrival: _Arrival) -> None:
        self._going.wait_for_current()
        with self._going.work():
            _copy(self._in(arrival.room, arrival.place), part_of(self.home, arrival.place))

    def _in(self, room: Tensor, place: slice) -> Moments:
        return moments_over(room, place.stop - place.start, self._bits)


def _copy(source: Moments, target: Moments) -> None:
    for field in fields(source):
        getattr(target, field.name).copy_(getattr(source, field.name), non_blocking=True)
