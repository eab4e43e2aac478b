"""AdamW whose step is one update over one buffer, with moments in 32 or 8 bits.

To the rest of the engine it is a `torch.optim.Optimizer` like any other: ``state_dict()["state"]`` has
each parameter's moments by name, as views of the buffers; paged ones are on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from qlora_core.errors import ConfigError, ResumePointError
from qlora_core.ops.adamw.moments import Moments8
from qlora_core.ops.adamw.ops import adamw_step_in_pieces
from qlora_core.ops.adamw.settings import AdamWSettings
from qlora_core.ops.working_copy import WorkingCopy
from qlora_core.optim.flat_tensors import FlatTensors
from qlora_core.optim.state_memory import Bits, PlainMemory, StateMemory
from qlora_core.quant.codebook import dynamic_map

_CODE_OF_ZERO = dynamic_map(signed=True).index(0.0)


class FlatAdamW(torch.optim.Optimizer):
    """AdamW over parameters of one device, which become views of one buffer.

    A gradient that is not finite changes nothing. A parameter without a gradient is treated as one
    whose gradient is zero: it decays, where torch would leave it out.

    Attributes:
        grad_norm: float32 [] on the device, of the last step's gradient, divided and not yet
            clipped; to read it waits for the device. Zero before the first step.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        *,
        bits: Bits,
        learning_rate: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_grad_norm: float = math.inf,
        copy_dtype: torch.dtype | None = None,
        open_memory: Callable[[int, Bits, torch.device], StateMemory] = PlainMemory,
    ) -> None:
        """Move the parameters into a buffer.

        Args:
            params: float32, of one device; whoever holds their data from before holds old memory.
            bits: of the moments.
            learning_rate: until another is set in ``param_groups[0]["lr"]``.
            weight_decay: decoupled, per step and unit of learning rate.
            betas: decay of the two moments.
            eps: added to the root of the second moment.
            max_grad_norm: longer gradients are scaled down to it, on the way.
            copy_dtype: float16 or bfloat16, for a copy of the parameters in it that each step writes in
                the same pass (`working_copy`); None for none.
            open_memory: given the buffer's elements, ``bits`` and device, takes memory for the moments.

        Raises:
            ConfigError: a setting is out of range, or there are no parameters.
            DtypeError, LayoutError: a parameter is not as described.
        """
        AdamWSettings(learning_rate, betas[0], betas[1], eps, weight_decay, max_grad_norm)
        self._flat = FlatTensors(params, copy_dtype=copy_dtype)
        defaults = {
            "lr": learning_rate,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
        }
        super().__init__(self._flat.params, defaults)
        n, device = self._flat.values.numel(), self._flat.values.device
        self._steps = torch.zeros(len(self._flat.params), device=device)
        self.grad_norm = torch.zeros((), device=device)
        self._memory = open_memory(n, bits, device)
        home = self._memory.home
        kinds = {
            "step": list(self._steps),
            "exp_avg": self._flat.views(home.mean),
            "exp_avg_sq": self._flat.views(home.square),
        }
        if isinstance(home, Moments8):
            kinds["exp_avg_absmax"] = self._flat.block_views(home.mean_absmax)
            kinds["exp_avg_sq_absmax"] = self._flat.block_views(home.square_absmax)
        for index, param in enumerate(self._flat.params):
            self.state[param] = {name: views[index] for name, views in kinds.items()}
        self._flat.zero_gradients()

    @property
    def paged(self) -> bool:
        """Whether the moments leave the device between steps."""
        return not isinstance(self._memory, PlainMemory)

    @property
    def resident_bytes(self) -> int:
        """Bytes of moments on the device, as far as is known; those of paged ones are 0 between steps."""
        return self._memory.resident_bytes

    @property
    def notice(self) -> str | None:
        """A sentence on why the moments are in another kind of memory than they should be."""
        return self._memory.notice

    def prefetch(self) -> None:
        """Begin to bring paged moments to the device, after what it was told so far; a step does it, too."""
        self._memory.prefetch()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the one group there is.

        Raises:
            ConfigError: it is a second one, which has no place in the buffer.
        """
        if self.param_groups:
            raise ConfigError("this optimizer has one group of parameters; no other can be added")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        closure: Callable[[], float] | None = None,
        *,
        divisor: float = 1.0,
        loss: Tensor | None = None,
    ) -> float | None:
        """Take a step with the settings of ``param_groups[0]``, and wait for nothing.

        Gradients are of no use afterwards: they may have been divided and clipped where they are.

        Args:
            closure: called first, with gradients enabled, as in torch.
            divisor: what gradients are divided by on the way, such as the number of tokens that they
                are a sum over.
            loss: float [] on the device; one that is not finite has the step change nothing.

        Returns:
            What ``closure`` gave.

        Raises:
            ConfigError: a setting is out of range.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        settings = AdamWSettings(
            group["lr"],
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            group["max_grad_norm"],
            divisor,
        )
        self._flat.gather_gradients()
        # Before the step, which may change nothing: the copies must be right either way.
        self._flat.renew_copies()
        with closing(self._memory.visit()) as pieces:
            self.grad_norm = adamw_step_in_pieces(
                self._flat.values,
                self._flat.gradients,
                pieces,
                self._steps,
                settings,
                loss=loss,
                copies=self._flat.copies,
            )
        return result

    def working_copy(self, param: nn.Parameter) -> WorkingCopy | None:
        """Give a parameter's copy in 16 bits, None where there is none."""
        return self._flat.working_copy(param)

    @property
    def copy_bytes(self) -> int:
        """Bytes of the parameters' copies in 16 bits, 0 where there are none."""
        return 0 if self._flat.copies is None else self._flat.copies.nbytes

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002 - torch's signature
        """Set all gradients to zero in one go; they stay where they are, whatever ``set_to_none``."""
        self._memory.page_out()  # brought for a step that was not taken
        self._flat.zero_gradients()

    def state_dict(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Give what torch's gives; paged moments are given on the host, and have been waited for."""
        self._memory.settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy moments, counts and settings from what `state_dict` gave; an empty state is the beginning.

        Raises:
            ResumePointError: they are of another optimizer or of other parameters; nothing was changed.
        """
        self._memory.settle()
        saved: dict[int, dict[str, Tensor]] = state_dict["state"]
        own = [self.state[param] for param in self._flat.params]
        if saved:
            found = [_shapes(saved[index]) for index in sorted(saved)]
            if sorted(saved) != list(range(len(own))) or found != [_shapes(each) for each in own]:
                raise ResumePointError("The optimizer's saved state is of another optimizer.")
        if isinstance(self._memory.home, Moments8):
            # Between tensors, too: there scales that are put back would make something of another code.
            self._memory.home.mean.fill_(_CODE_OF_ZERO)
        for index, views in enumerate(own):
            for name, view in views.items():
                if saved:
                    view.copy_(saved[index][name])
                else:
                    view.zero_()
        (group,) = state_dict["param_groups"]
        self.param_groups[0].update(
            {name: value for name, value in group.items() if name != "params"}
        )


def _shapes(moments: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (value.shape, value.dtype) for name, value in moments.items()}
