"""What the backward pass needs is kept in the host's memory until then, for GPUs that cannot hold it.

With every layer recomputed that is each layer's input: one copy out for each on the way forward, and one back in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Smaller ones are not worth a copy.
_SMALLEST_BYTES = 64 * 1024

_Kept = Tensor | tuple[torch.device, Tensor]


@contextmanager
def saved_on_host(
    always_there: Iterable[Tensor], *, smallest_bytes: int = _SMALLEST_BYTES
) -> Iterator[None]:
    """Keep what autograd saves inside the block on the host, but for what is on the device anyway.

    Args:
        always_there: parameters and buffers; to copy them out would free nothing.
        smallest_bytes: of what is copied.
    """
    there = {tensor.untyped_storage().data_ptr() for tensor in always_there}

    def pack(tensor: Tensor) -> _Kept:
        if tensor.nbytes < smallest_bytes or tensor.untyped_storage().data_ptr() in there:
            return tensor
        # Pinned, so that the copy is made while the device goes on; in the order of its stream, so that nothing
        # has to wait for it: the memory that it reads from is given to later work only.
        pinned = tensor.device.type == "cuda"
        kept = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        kept.copy_(tensor, non_blocking=pinned)
        return tensor.device, kept

    def unpack(kept: _Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        device, tensor = kept
        return tensor.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
