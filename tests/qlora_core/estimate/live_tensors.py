"""Counts the bytes of all tensors alive while a step runs, by the memory they share, and their peak.

A tensor's memory is noticed when an operation gives it out, and gone when torch drops it. Nothing of the engine or of the
estimate is asked.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Counts while it is entered.

    Args:
        here: tensors that are there before, counted from the beginning.
        apart: tensors that are there before and are not counted.

    Attributes:
        live_bytes: now.
        peak_bytes: at most.
    """

    def __init__(self, here: Iterable[Tensor], *, apart: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: dict[int, Any] = {}
        self._held = [tensor.untyped_storage() for tensor in apart]
        self._known.update({id(storage): None for storage in self._held})
        for tensor in here:
            self._notice(tensor)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, Tensor):
                self._notice(one)
        return found

    def _notice(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = id(storage), storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            del self._known[key]
            self.live_bytes -= nbytes

        self._known[key] = weakref.ref(storage, gone)
        self.live_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


def distinct_bytes(tensors: Iterable[Tensor]) -> int:
    """Add up the bytes of memory that tensors have, what they share once."""
    storages = {id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def frozen_tensors(model: nn.Module) -> list[Tensor]:
    """Give parameters that are not trained, and buffers."""
    return [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Give what an optimizer keeps."""
    kept = (value for state in optimizer.state.values() for value in state.values())
    return [value for value in kept if isinstance(value, Tensor)]
