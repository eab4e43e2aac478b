"""A memory of a size that a test sets: torch's tensors are counted, and what would exceed it is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from qlora_core.quant.workspace import release_idle
from tests.qlora_core.estimate.live_tensors import LiveTensors


class MemoryCap(LiveTensors):
    """Raises torch's own error while it is entered; the model itself, there before, is not counted."""

    def __init__(self, model: nn.Module, most_bytes: float = float("inf")) -> None:
        # What a product of another test has left is as large as its weight, and would count here.
        release_idle()
        super().__init__([], apart=[*model.parameters(), *model.buffers()])
        self.most_bytes = most_bytes
        self.n_refused = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = super().__torch_dispatch__(func, types, args, kwargs)
        if self.live_bytes > self.most_bytes:
            del found
            self.n_refused += 1
            raise torch.OutOfMemoryError("the test's cap")
        return found
