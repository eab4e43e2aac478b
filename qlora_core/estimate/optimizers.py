"""What each optimizer keeps beside a run's trained tensors, by the name that a run's settings have for it.

All move the trained tensors and their gradients into buffers (`qlora_core.optim.flat_tensors`), whose padding counts,
too; a test holds sizes and names to the optimizers themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_core.estimate.operations import FLOAT32

# Elements that share a scale of moments in 8 bits; each tensor begins at a new block.
_BLOCK = 256
# The buffers end with a whole tile.
_TILE = 1024
_MOMENTS = 2


@dataclass(frozen=True)
class Optimizer:
    """What of an optimizer takes memory.

    Attributes:
        bits: of each moment.
        paged: whether, on a GPU, the moments are in host memory while activations are made.
    """

    bits: int
    paged: bool = False

    def state_bytes(self, tensors: Sequence[int]) -> int:
        """Return the bytes of the moments and of each tensor's number of steps."""
        return FLOAT32 * len(tensors) + self._moments_bytes(buffer_elements(tensors))

    def saved_bytes(self, tensors: Sequence[int]) -> int:
        """Return the bytes of the same on disk, where nothing is padded."""
        return sum(FLOAT32 + self._moments_bytes(elements) for elements in tensors)

    @property
    def saved_per_tensor(self) -> int:
        """How many tensors are saved for each that is trained: both moments, the steps, and scales of codes."""
        return 3 if self.bits == 32 else 5

    def _moments_bytes(self, elements: int) -> int:
        scales = 0 if self.bits == 32 else FLOAT32 * -(-elements // _BLOCK)
        return _MOMENTS * (elements * self.bits // 8 + scales)


OPTIMIZERS = {
    "adamw": Optimizer(32),
    "adamw_8bit": Optimizer(8),
    "paged_adamw": Optimizer(32, paged=True),
    "paged_adamw_8bit": Optimizer(8, paged=True),
}


def buffer_elements(tensors: Sequence[int]) -> int:
    """Return the elements of a buffer for trained tensors of so many elements each; another has their gradients."""
    blocks = sum(-(-elements // _BLOCK) for elements in tensors)
    return max(1, -(-blocks * _BLOCK // _TILE)) * _TILE
