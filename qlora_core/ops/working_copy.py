"""A copy in 16 bits of a trained tensor, which products take instead of casting the tensor each time.

The optimizer keeps it: its step writes both. Whoever else writes to the tensor (an adapter that is put back,
a model that is moved) need not know of the copy: it then is not taken any more until the optimizer has
renewed it. Only what is written through ``.data`` goes unseen.
"""

from __future__ import annotations

import torch
from torch import Tensor


class WorkingCopy:
    """A copy, and what its tensor looked like when the two were last the same.

    Attributes:
        values: in the tensor's shape, on its device; belongs to the optimizer.
    """

    def __init__(self, master: Tensor, values: Tensor) -> None:
        """Fill ``values`` from ``master``."""
        self._master = master
        self.values = values
        self.renew()

    def renew(self) -> None:
        """Make the copy what the tensor is now."""
        self.values.copy_(self._master.detach())
        self._seen = self._state()

    @property
    def current(self) -> bool:
        """Whether nobody but the optimizer has written to the tensor, or given it other memory."""
        return self._seen == self._state()

    def of(self, master: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Give the copy if it is one of this very tensor as it is now, and in this dtype."""
        fits = master is self._master and self.values.dtype == dtype and self.current
        return self.values if fits else None

    def _state(self) -> tuple[int, int]:
        # torch counts what is written to a tensor; the optimizer writes through the whole buffer, uncounted.
        return self._master._version, self._master.data_ptr()  # noqa: SLF001
