"""A stream of a GPU beside the one that computes; on a CPU, where everything happens at once, nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


class SideStream:
    """Work that a device does beside its current stream, which is always that of the calling thread."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def handle(self) -> int:
        """CUDA's own handle; 0, its default stream, on a CPU."""
        return 0 if self._stream is None else self._stream.cuda_stream

    def work(self) -> AbstractContextManager[object]:
        """What torch is told inside happens on this stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def wait_for_current(self) -> None:
        """Let what comes wait for what the current stream was told so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def wait_for(self, other: SideStream) -> None:
        """Let what comes wait for what ``other`` was told so far."""
        if self._stream is not None and other._stream is not None:
            self._stream.wait_stream(other._stream)

    def mark(self) -> Callable[[], None]:
        """Give a function that lets the current stream wait for what this one was told so far."""
        if self._stream is None:
            return lambda: None
        stream, event = self._stream, self._stream.record_event()
        return lambda: torch.cuda.current_stream(stream.device).wait_event(event)

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Let nobody reuse memory of the current stream before what this one was told so far is done."""
        if self._stream is not None:
            for tensor in tensors:
                tensor.record_stream(self._stream)

    def synchronize(self) -> None:
        """Wait here until everything that this stream was told is done."""
        if self._stream is not None:
            self._stream.synchronize()
