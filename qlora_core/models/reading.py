"""Reads tensors out of safetensors files one at a time, into memory that the next one uses again.

Files are read, not mapped: pages of a mapping stay in the process's memory after their tensor is done with, and a file
that shrinks meanwhile would kill the process instead of giving an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from qlora_core.errors import ModelUnsupported, ModelWeightsInvalid
from qlora_core.models.dtypes import DTYPE_OF
from qlora_core.models.files import WeightFiles
from qlora_core.models.header import TensorPlace
from qlora_core.quant.devices import launching_on

_STAGING_BYTES = 32 * 2**20


class TensorReader:
    """Reads the tensors of a checkpoint onto a device; use it as a context manager.

    Args:
        files: the checkpoint.
        device: where tensors go. On a GPU they pass through two pinned buffers, one being filled from the file while
            the other is on its way.
        on_progress: called with (bytes done, bytes in all) after each tensor.
    """

    def __init__(
        self,
        files: WeightFiles,
        device: torch.device,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._files = files
        self._device = device
        self._on_progress = on_progress
        self._done_bytes = 0
        self._lent: Tensor | None = None
        self._staging: Staging | None = None
        self._opened: dict[Path, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lent = self._staging = None
        self._stack.close()

    def take(self, name: str) -> Tensor:
        """Read a tensor into memory of its own.

        Raises:
            ModelWeightsInvalid: the file is not as long as it was when its header was read, or cannot be read.
            ModelUnsupported: the tensor's dtype is one that torch does not have.
        """
        place = self._files.places[name]
        return self._read(name, torch.empty(place.nbytes, dtype=torch.uint8, device=self._device))

    def lend(self, name: str) -> Tensor:
        """Read a tensor into memory that the next call overwrites; on a GPU, into memory of its own.

        Raises:
            ModelWeightsInvalid, ModelUnsupported: as `take`.
        """
        return self._read(name, self._memory(self._files.places[name].nbytes))

    def lend_joined(self, names: Sequence[str]) -> Tensor:
        """Read tensors of one dtype, equal in all sizes but the first, as one: joined along the first dimension.

        They are read side by side into memory as `lend`'s, so that no tensor is held twice.

        Raises:
            ModelWeightsInvalid, ModelUnsupported: as `take`.
        """
        places = [self._files.places[name] for name in names]
        out = self._memory(sum(place.nbytes for place in places))
        pieces = out.split([place.nbytes for place in places])
        dtypes = [self._read(name, piece).dtype for name, piece in zip(names, pieces, strict=True)]
        rows = sum(place.shape[0] for place in places)
        return out.view(dtypes[0]).view(rows, *places[0].shape[1:])

    def forget(self) -> None:
        """Give lent memory back, where the next tensors need memory of their own."""
        self._lent = None

    def _memory(self, nbytes: int) -> Tensor:
        """Give uint8 [nbytes] to read into: on a CPU the same memory again."""
        if self._device.type != "cpu":
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        if self._lent is None or self._lent.numel() < nbytes:
            # Room for the largest at once: pages that no tensor has touched yet cost nothing.
            largest = max(place.nbytes for place in self._files.places.values())
            self._lent = None  # before the larger one is there
            self._lent = torch.empty(max(nbytes, largest), dtype=torch.uint8)
        return self._lent[:nbytes]

    def _read(self, name: str, out: Tensor) -> Tensor:
        place = self._files.places[name]
        dtype = DTYPE_OF.get(place.dtype)
        if dtype is None:
            raise ModelUnsupported(
                f"{name} is {place.dtype} in the checkpoint; only float16, bfloat16 and float32 "
                "weights can be loaded"
            )
        try:
            self._fill(place, out)
        except OSError as error:
            raise ModelWeightsInvalid(
                f"the tensor {name} cannot be read from {place.path.name} ({error})"
            ) from error
        self._done_bytes += place.nbytes
        if self._on_progress is not None:
            total = self._files.total_bytes
            self._on_progress(min(self._done_bytes, total), total)
        return out.view(dtype).view(place.shape)

    def _fill(self, place: TensorPlace, out: Tensor) -> None:
        file = self._open(place.path)
        if self._device.type == "cpu":
            read_into(out, file, place.start)
            return
        if self._staging is None:
            self._staging = Staging(self._device, _STAGING_BYTES)
        self._staging.fill(out, file, place.start)

    def _open(self, path: Path) -> int:
        file = self._opened.get(path)
        if file is None:
            file = self._opened[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._stack.callback(os.close, file)
        return file


class Staging:
    """Two buffers through which a file's bytes reach a device: one is filled while the other is copied.

    Args:
        device: where the bytes go; on a GPU the buffers are pinned.
        buffer_bytes: size of each buffer.
    """

    def __init__(self, device: torch.device, buffer_bytes: int) -> None:
        self._device = device
        on_gpu = device.type == "cuda"
        self._buffers = [
            torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)
        ]
        with launching_on(device):
            self._copied = [torch.cuda.Event() if on_gpu else None for _ in range(2)]
        self._turn = 0

    def fill(self, out: Tensor, file: int, start: int) -> None:
        """Fill ``out``, uint8 on the device, from byte ``start`` of the open file on.

        Raises:
            OSError: the file ends before that, or cannot be read.
        """
        with launching_on(self._device):
            for piece in out.split(self._buffers[0].numel()):
                buffer, copied = self._buffers[self._turn], self._copied[self._turn]
                if copied is not None:
                    copied.synchronize()  # the buffer's last bytes have left it
                source = buffer[: piece.numel()]
                read_into(source, file, start)
                piece.copy_(source, non_blocking=True)
                if copied is not None:
                    copied.record()
                start += piece.numel()
                self._turn = 1 - self._turn


def read_into(out: Tensor, file: int, start: int) -> None:
    """Fill ``out``, uint8 on the CPU, from byte ``start`` of the open file on.

    Raises:
        OSError: the file ends before that, or cannot be read.
    """
    left = memoryview(out.numpy())
    while left:
        count = os.preadv(file, [left], start)
        if count == 0:
            raise OSError(f"the file ends at byte {start}")
        left, start = left[count:], start + count
