"""Where a quantized weight lives while one matrix product needs it dense.

On a CPU one buffer per thread and dtype is kept and reused, because page faults on fresh memory
cost as much as dequantizing into it; on a GPU the caching allocator already does that. No module
and no autograd graph ever holds the dense tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qlora_core.quant.memory import empty
from qlora_core.quant.weight import NF4Weight


class _Buffers(threading.local):
    """The calling thread's idle buffers, by dtype."""

    def __init__(self) -> None:
        self.idle: dict[torch.dtype, Tensor] = {}


_buffers = _Buffers()


@contextmanager
def dense(weight: NF4Weight | Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Lend the weight as a dense tensor of ``dtype`` for the length of the block.

    Args:
        weight: quantized, or a frozen dense tensor (lent as it is when its dtype fits).
        dtype: float16, bfloat16 or float32.

    Yields:
        The weight in its own shape. Its memory is reused afterwards: keep no reference to it.
    """
    if isinstance(weight, Tensor):
        yield weight.to(dtype)
        return
    if weight.device.type != "cpu":
        yield weight.dequantize(dtype)
        return

    n = weight.shape.numel()
    # Taken out while lent, so that a second weight needed inside the block gets its own.
    buffer = _buffers.idle.pop(dtype, None)
    if buffer is None or buffer.numel() < n:
        # A buffer made in inference mode could not be written outside of it.
        with torch.inference_mode(mode=False):
            buffer = empty(n, dtype)
    try:
        yield weight.dequantize(dtype, out=buffer[:n])
    finally:
        _buffers.idle[dtype] = buffer


def release_idle() -> None:
    """Give back the calling thread's idle buffers; the next product makes new ones."""
    _buffers.idle.clear()
