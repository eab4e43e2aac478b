"""Functions with the names of CUDA's runtime, for machines without one.

They are C functions, called through their addresses and declared here from CUDA's headers: what arrives
has gone the way that it goes to the real ones. Managed memory is ordinary memory.
"""

from __future__ import annotations

import ctypes
from ctypes import CFUNCTYPE, POINTER, c_int, c_size_t, c_uint, c_void_p
from typing import Any


class MemLocation(ctypes.Structure):
    """struct cudaMemLocation of driver_types.h, CUDA 13.0: an enum and an int."""

    _fields_ = [("type", c_int), ("id", c_int)]


class RuntimeStandIn:
    """A library as ctypes gives one.

    Attributes:
        calls: names and arguments, in order, of what changes something.
        live: managed memory that was not freed, by address.
        failing: name of a function to its error.
        concurrent: the attribute of every device.
    """

    def __init__(self, version: int) -> None:
        self.version = version
        self.calls: list[tuple[Any, ...]] = []
        self.live: dict[int, ctypes.Array[ctypes.c_uint8]] = {}
        self.failing: dict[str, int] = {}
        self.concurrent = 1
        self.last_error = 0
        self._callbacks: list[Any] = []
        by_location = version >= 13000
        prefetch = (
            [c_void_p, c_size_t, MemLocation, c_uint, c_void_p]
            if by_location
            else [c_void_p, c_size_t, c_int, c_void_p]
        )
        where = MemLocation if by_location else c_int
        self.cudaRuntimeGetVersion = self._c(self._get_version, c_int, [POINTER(c_int)])
        self.cudaDeviceGetAttribute = self._c(
            self._get_attribute, c_int, [POINTER(c_int), c_int, c_int]
        )
        self.cudaMallocManaged = self._c(
            self._malloc_managed, c_int, [POINTER(c_void_p), c_size_t, c_uint]
        )
        self.cudaFree = self._c(self._free, c_int, [c_void_p])
        self.cudaMemPrefetchAsync = self._c(self._recording("prefetch"), c_int, prefetch)
        self.cudaMemAdvise = self._c(
            self._recording("advise"), c_int, [c_void_p, c_size_t, c_int, where]
        )
        self.cudaGetLastError = self._c(self._get_last_error, c_int, [])
        self._words = ctypes.create_string_buffer(b"out of memory")
        # A callback cannot give a string back; an address is the same to the caller.
        self.cudaGetErrorString = self._c(
            lambda _: ctypes.addressof(self._words), c_void_p, [c_int]
        )

    def _c(self, function: Any, result: Any, kinds: list[Any]) -> Any:
        callback = CFUNCTYPE(result, *kinds)(function)
        self._callbacks.append(callback)  # ctypes does not keep it
        address = ctypes.cast(callback, c_void_p).value
        assert address is not None
        return CFUNCTYPE(c_int)(address)

    def _status(self, name: str) -> int:
        self.last_error = self.failing.get(name, self.last_error)
        return self.failing.get(name, 0)

    def _get_version(self, version: Any) -> int:
        version[0] = self.version
        return self._status("version")

    def _get_attribute(self, value: Any, attribute: int, device: int) -> int:
        # cudaDevAttrConcurrentManagedAccess is 89.
        value[0] = self.concurrent if attribute == 89 and device >= 0 else -1
        return self._status("attribute")

    def _malloc_managed(self, pointer: Any, n_bytes: int, flags: int) -> int:
        status = self._status("malloc")
        if status == 0:
            memory = (ctypes.c_uint8 * n_bytes)()
            ctypes.memset(memory, 0xFF, n_bytes)  # NaN, in floats
            self.live[ctypes.addressof(memory)] = memory
            pointer[0] = ctypes.addressof(memory)
            self.calls.append(("malloc", n_bytes, flags))
        return status

    def _free(self, pointer: int) -> int:
        self.calls.append(("free", pointer))
        del self.live[pointer]
        return self._status("free")

    def _get_last_error(self) -> int:
        status, self.last_error = self.last_error, 0
        return status

    def _recording(self, name: str) -> Any:
        def record(*arguments: Any) -> int:
            # A callback's structure does not outlive the call, and NULL arrives as None.
            plain = [(a.type, a.id) if isinstance(a, MemLocation) else a or 0 for a in arguments]
            self.calls.append((name, *plain))
            return self._status(name)

        return record
