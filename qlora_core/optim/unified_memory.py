"""Paged moments in NVIDIA's unified memory: one address for host and GPU, between which pages move.

Pages are moved by explicit prefetches only. The host is their preferred place, so what is not on the GPU
when a step comes to it (there may be no room) is read and written over the bus, where it is: each element
is needed once per step, and to move its page for that would only put out another one. No other advice is
given.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from qlora_core.errors import DeviceError
from qlora_core.optim.cuda_runtime import CudaRuntime, loaded_runtime
from qlora_core.optim.side_stream import SideStream
from qlora_core.optim.state_memory import Bits, Moments, moment_bytes, moments_over


class UnifiedMemory:
    """Moments in managed memory, at home on the host."""

    notice = None

    def __init__(
        self, n: int, bits: Bits, device: torch.device, *, runtime: CudaRuntime | None = None
    ) -> None:
        """Take managed memory for the moments of n elements, a multiple of 1024.

        Args:
            n: how many elements.
            bits: of a moment.
            device: where steps are taken; on a CPU everything is done but for the tensors' device.
            runtime: CUDA's; that which torch has loaded if not given.

        Raises:
            DeviceError: there is none, CPU and GPU may not use such memory at once, or it gives none.
        """
        runtime = runtime or loaded_runtime()
        self._index = _index(device)
        if not runtime.concurrent_managed_access(self._index):
            raise DeviceError("CPU and GPU cannot use managed memory at the same time here.")
        self._runtime = runtime
        self._n, self._n_bytes = n, moment_bytes(n, bits)
        with _current(device):
            memory = managed(self._n_bytes, runtime)
        self._pointer = ctypes.addressof(memory)
        runtime.prefer_host(self._pointer, self._n_bytes)
        home = torch.frombuffer(memory, dtype=torch.uint8).zero_()
        self.home: Moments = moments_over(home, n, bits)
        self._on_device = self.home
        if device.type == "cuda":
            self._on_device = moments_over(_on_gpu(memory, device), n, bits)
        self._stream = SideStream(device)
        self._resident = False

    @property
    def resident_bytes(self) -> int:
        """All or nothing, by what was asked for; what the driver moves by itself is not seen."""
        return self._n_bytes if self._resident else 0

    def prefetch(self) -> None:
        """Begin to bring everything."""
        if not self._resident:
            self._move(self._index)
            self._resident = True

    def visit(self) -> Generator[tuple[slice, Moments]]:
        """Give everything at once."""
        self.prefetch()
        self._stream.mark()()
        try:
            yield slice(0, self._n), self._on_device
        finally:
            self.page_out()

    def page_out(self) -> None:
        """Begin to move everything to the host."""
        if self._resident:
            self._move(None)
            self._resident = False

    def settle(self) -> None:
        """Page out, and wait until it is done."""
        self.page_out()
        self._stream.synchronize()

    def _move(self, to: int | None) -> None:
        self._stream.wait_for_current()
        self._runtime.prefetch(self._pointer, self._n_bytes, to=to, stream=self._stream.handle)


def managed(n_bytes: int, runtime: CudaRuntime) -> ctypes.Array[ctypes.c_uint8]:
    """Take managed memory of the current device; it is freed when nothing refers to it any more.

    Returns:
        What `torch.frombuffer` and `torch.as_tensor` make tensors of, on the host and on the GPU; they
        and their views keep it.
    """
    memory = _bytes_on_both_sides(n_bytes).from_address(runtime.allocate(n_bytes))
    # At the end of the process the driver frees it, and torch may be gone by then.
    weakref.finalize(memory, runtime.free, ctypes.addressof(memory)).atexit = False
    return memory


def _bytes_on_both_sides(n_bytes: int) -> type[ctypes.Array[ctypes.c_uint8]]:
    """Make a type of bytes that also tells where they are as CUDA arrays do."""

    def interface(memory: ctypes.Array[ctypes.c_uint8]) -> dict[str, object]:
        data = (ctypes.addressof(memory), False)  # not read-only
        return {"shape": (n_bytes,), "typestr": "|u1", "data": data, "version": 3}

    members = {
        "_type_": ctypes.c_uint8,
        "_length_": n_bytes,
        "__cuda_array_interface__": property(interface),
    }
    return type("ManagedBytes", (ctypes.Array,), members)


def _on_gpu(memory: ctypes.Array[ctypes.c_uint8], device: torch.device) -> Tensor:
    tensor = torch.as_tensor(memory, device=device)
    if tensor.data_ptr() != ctypes.addressof(memory):
        raise DeviceError("torch has copied managed memory where it was to use it in place.")
    return tensor


def _current(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _index(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index
