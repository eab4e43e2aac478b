"""Where the memory of an optimizer's state comes from."""

from __future__ import annotations

import torch
from torch import Tensor


def allocate_state(n: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Give n zeros that live as long as the optimizer; every moment of every optimizer comes from here."""
    return torch.zeros(n, dtype=dtype, device=device)
