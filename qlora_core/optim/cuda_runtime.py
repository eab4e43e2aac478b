"""Managed memory from CUDA's runtime, which torch has no functions for.

The library has to be the one that torch itself has loaded: another copy would have a runtime of its own,
with its own idea of the current device and its own last error. torch's packages link libcudart as a
library of its own, so the process's memory map names its file, and opening that file again gives the same
library.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import Any

import torch

from qlora_core.errors import DeviceError

_MAPS = Path("/proc/self/maps")
# cudaMemAttachGlobal, cudaMemAdviseSetPreferredLocation, cudaDevAttrConcurrentManagedAccess.
_ATTACH_GLOBAL, _PREFERRED_LOCATION, _CONCURRENT_MANAGED_ACCESS = 1, 3, 89
# cudaMemLocationTypeDevice and cudaMemLocationTypeHost; before CUDA 13 cudaCpuDeviceId.
_DEVICE, _HOST, _HOST_ID = 1, 2, -1


class Location(ctypes.Structure):
    """CUDA's cudaMemLocation, which is passed by value."""

    _fields_ = [("type", c_int), ("id", c_int)]


class CudaRuntime:
    """The functions around managed memory, with one sentence for what fails.

    Prefetching and advising have two forms: ``(pointer, bytes, int device, stream)`` and
    ``(pointer, bytes, advice, int device)`` up to CUDA 12; from CUDA 13 on a `Location` by value in the
    device's place, and flags before the stream.

    Attributes:
        version: 1000 times the major version and 10 times the minor one.

    Source: cuda_runtime_api.h and driver_types.h of CUDA 12.9, 13.0 and 13.5.
    """

    def __init__(self, library: Any) -> None:  # noqa: ANN401 - ctypes makes functions as they are asked for
        """Take a loaded libcudart.

        Raises:
            DeviceError: it lacks a function, or does not tell its version.
        """
        self._library = library
        version = c_int()
        self._call("cudaRuntimeGetVersion", [POINTER(c_int)], ctypes.byref(version))
        self.version: int = version.value

    def concurrent_managed_access(self, device: int) -> bool:
        """Whether CPU and GPU may use managed memory at the same time; not so on Windows and WSL."""
        value = c_int()
        self._call(
            "cudaDeviceGetAttribute",
            [POINTER(c_int), c_int, c_int],
            ctypes.byref(value),
            _CONCURRENT_MANAGED_ACCESS,
            device,
        )
        return value.value == 1

    def allocate(self, n_bytes: int) -> int:
        """Give the address of managed memory of the current device, to be freed by `free`."""
        pointer = c_void_p()
        self._call(
            "cudaMallocManaged",
            [POINTER(c_void_p), c_size_t, c_uint],
            ctypes.byref(pointer),
            n_bytes,
            _ATTACH_GLOBAL,
        )
        if not pointer.value:
            raise DeviceError("cudaMallocManaged gave no memory.")
        return pointer.value

    def free(self, pointer: int) -> None:
        """Free what `allocate` gave; waits for the device."""
        self._call("cudaFree", [c_void_p], pointer)

    def prefetch(self, pointer: int, n_bytes: int, *, to: int | None, stream: int) -> None:
        """Begin to move memory to a device, or to the host, on a stream given by its handle."""
        if self.version >= 13000:
            kinds = [c_void_p, c_size_t, Location, c_uint, c_void_p]
            where = (_location(to), 0)
        else:
            kinds = [c_void_p, c_size_t, c_int, c_void_p]
            where = (_HOST_ID if to is None else to,)
        self._call("cudaMemPrefetchAsync", kinds, pointer, n_bytes, *where, stream)

    def prefer_host(self, pointer: int, n_bytes: int) -> None:
        """Tell that memory is best on the host: a GPU that faults on it then reads it there in place."""
        kinds = [c_void_p, c_size_t, c_int, Location if self.version >= 13000 else c_int]
        where = _location(None) if self.version >= 13000 else _HOST_ID
        self._call("cudaMemAdvise", kinds, pointer, n_bytes, _PREFERRED_LOCATION, where)

    def _call(self, name: str, kinds: list[Any], *arguments: object) -> None:
        function = self._function(name, kinds)
        status: int = function(*arguments)
        if status == 0:
            return
        # Left in place, the error would be raised by torch's next launch.
        self._function("cudaGetLastError", [])()
        describe = self._function("cudaGetErrorString", [c_int], c_char_p)
        reason = (describe(status) or b"unknown error").decode(errors="replace")
        raise DeviceError(f"{name} failed: {reason} (CUDA error {status}).")

    def _function(self, name: str, kinds: list[Any], result: Any = c_int) -> Any:  # noqa: ANN401
        try:
            function = getattr(self._library, name)
        except AttributeError as error:
            raise DeviceError(f"CUDA's runtime has no function {name}.") from error
        function.argtypes, function.restype = kinds, result
        return function


def loaded_runtime(maps: Path = _MAPS, cuda: str | None = torch.version.cuda) -> CudaRuntime:
    """Find the runtime that torch has loaded.

    Args:
        maps: the process's memory map.
        cuda: the version of CUDA that torch was built for.

    Raises:
        DeviceError: there is none, because torch was built without CUDA or has it built in.
    """
    wanted = f"libcudart.so.{(cuda or '').partition('.')[0]}"
    try:
        lines = maps.read_text().splitlines()
        found = {line.split(maxsplit=5)[-1] for line in lines if wanted in line}
        # Another package may have brought a runtime of another major version.
        paths = sorted(path for path in found if f"{Path(path).name}.".startswith(f"{wanted}."))
        if not cuda or not paths:
            raise DeviceError("torch has loaded no libcudart of its own.")
        return CudaRuntime(ctypes.CDLL(paths[0]))
    except OSError as error:
        raise DeviceError(f"CUDA's runtime cannot be found: {error}.") from error


def _location(device: int | None) -> Location:
    return Location(_HOST, 0) if device is None else Location(_DEVICE, device)
