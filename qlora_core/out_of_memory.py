"""Which errors of torch, Triton, CUDA and the system say that memory has ended.

Most of them are plain RuntimeErrors and known by their words alone. Torch need not be there to ask.
"""

from __future__ import annotations

import errno

# What may be such an error; `is_out_of_memory` tells which are.
OUT_OF_MEMORY = (MemoryError, RuntimeError, OSError)
# Of torch's allocator on a CPU, CUDA's calls, cuBLAS, and Triton, which loads a kernel when it is first launched.
_IN_WORDS = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the host, has no memory left."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        is_torchs_own = type(error).__name__ == "OutOfMemoryError"
        return is_torchs_own or any(words in str(error) for words in _IN_WORDS)
    return isinstance(error, MemoryError)
