"""Many trained tensors as views of one buffer, and their gradients as views of another.

Each tensor begins at a new block of 256 elements, and the buffers end with a whole tile. So no block
of 8-bit moments holds elements of two tensors, whose gradients may differ by orders of magnitude (a
LoRA B and its A, at first); what is in between stays zero. It costs at most 255 elements per tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qlora_core.errors import ConfigError
from qlora_core.ops.adamw.settings import BLOCK_SIZE, TILE
from qlora_core.ops.working_copy import WorkingCopy
from qlora_core.quant.checks import check_dtype, check_layout


class FlatTensors:
    """Parameters moved into one buffer.

    Attributes:
        params: the parameters, whose data are views of ``values`` from now on.
        values: float32 [n], n a multiple of 1024.
        gradients: float32 [n].
        copies: float16 or bfloat16 [n], what ``values`` are rounded to, or None.
        places: where in the buffers each parameter lies.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], *, copy_dtype: torch.dtype | None = None
    ) -> None:
        """Move the parameters; their numbers stay what they are.

        Args:
            params: float32, of one device.
            copy_dtype: of ``copies``; None for none.

        Raises:
            ConfigError: there is none, or one is there twice.
            DtypeError, LayoutError: one is not float32, without memory, or on another device.
        """
        if not params or len({id(param) for param in params}) < len(params):
            raise ConfigError("an optimizer needs at least one parameter, and each of them once")
        named = {f"parameter {index}": param.detach() for index, param in enumerate(params)}
        check_dtype(torch.float32, **named)
        check_layout(**{name: value.contiguous() for name, value in named.items()})
        self.params = list(params)
        self.places: list[slice] = []
        end = 0
        for param in params:
            self.places.append(slice(end, end + param.numel()))
            end += _padded(param.numel(), BLOCK_SIZE)
        n = max(_padded(end, TILE), TILE)
        self.values = torch.zeros(n, device=params[0].device)
        self.gradients = torch.zeros_like(self.values)
        for param, view in zip(params, self.views(self.values), strict=True):
            before = param.detach().clone()
            param.data = view
            # Through the parameter, so that copies which another buffer had of it know of this one.
            param.detach().copy_(before)
        self.copies = (
            None if copy_dtype is None else torch.zeros_like(self.values, dtype=copy_dtype)
        )
        self._working: dict[int, WorkingCopy] = {}
        if self.copies is not None:
            views = zip(params, self.views(self.copies), strict=True)
            self._working = {id(param): WorkingCopy(param, view) for param, view in views}
        self._gradient_views = self.views(self.gradients)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Give each parameter's part of a buffer of n elements, in the parameter's shape."""
        return [
            buffer[place].view(param.shape)
            for place, param in zip(self.places, self.params, strict=True)
        ]

    def block_views(self, scales: Tensor) -> list[Tensor]:
        """Give each parameter's part of a buffer with one number per block of 256 elements."""
        return [
            scales[place.start // BLOCK_SIZE : -(-place.stop // BLOCK_SIZE)]
            for place in self.places
        ]

    def working_copy(self, param: nn.Parameter) -> WorkingCopy | None:
        """Give a parameter's copy, None where there is none."""
        return self._working.get(id(param))

    def renew_copies(self) -> None:
        """Write those copies anew whose parameters someone else has written to."""
        for copy in self._working.values():
            if not copy.current:
                copy.renew()

    def zero_gradients(self) -> None:
        """Set all gradients to zero, and let the backward add to the buffer."""
        self.gradients.zero_()
        for param, view in zip(self.params, self._gradient_views, strict=True):
            param.grad = view

    def gather_gradients(self) -> None:
        """Copy those gradients into the buffer that are tensors of their own; none at all is zeros."""
        for param, view in zip(self.params, self._gradient_views, strict=True):
            if param.grad is None:
                view.zero_()
            elif param.grad is not view:
                view.copy_(param.grad)


def _padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
