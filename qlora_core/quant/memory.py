"""New memory for results on CPUs, in large pages where the system has them.

The first touch of a fresh page costs more than dequantizing into it, and a large page needs one
such touch instead of 512.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

# Below this, malloc usually has memory at hand that was touched before.
_LARGE_BYTES = 4 * 2**20
_LARGE_PAGES: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux only


def empty(n: int, dtype: torch.dtype) -> Tensor:
    """Give a new tensor of ``dtype`` [n] on the CPU that holds anything; its storage cannot grow."""
    size = n * dtype.itemsize
    if size < _LARGE_BYTES or _LARGE_PAGES is None or torch.compiler.is_compiling():
        return torch.empty(n, dtype=dtype, device="cpu")
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A kernel built without large pages refuses; the memory is good all the same.
    with contextlib.suppress(OSError):
        pages.madvise(_LARGE_PAGES)
    return torch.frombuffer(pages, dtype=dtype)
