"""What a step of AdamW is told, and the numbers that follow from how many steps there were."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qlora_core.errors import ConfigError

# Elements that share a scale of 8-bit moments. Source: arXiv:2110.02861; bitsandbytes has the same.
BLOCK_SIZE = 256
# The flat buffers hold whole tiles, so that kernels have no rest.
TILE = 1024


@dataclass(frozen=True)
class AdamWSettings:
    """One step's settings.

    Attributes:
        learning_rate: of this step.
        beta1: decay of the first moment, from 0 to below 1.
        beta2: decay of the second moment, from 0 to below 1.
        eps: added to the root of the second moment, above 0.
        weight_decay: decoupled, per unit of learning rate.
        max_grad_norm: longer gradients, once divided, are scaled down to it; infinity for never.
        gradient_divisor: what gradients are divided by on the way, such as the number of tokens that
            they are a sum over.

    Raises:
        ConfigError: one of them is outside its range.
    """

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = math.inf
    gradient_divisor: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("learning_rate", 0.0), ("weight_decay", 0.0)):
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise ConfigError(f"{name} must be a number of at least 0, not {value}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be from 0 to below 1, not {getattr(self, name)}")
        for name in ("eps", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0 < self.gradient_divisor < math.inf:
            raise ConfigError(
                f"gradient_divisor must be a number above 0, not {self.gradient_divisor}"
            )

    @property
    def decay(self) -> float:
        """What weights are multiplied by before the update."""
        return 1 - self.learning_rate * self.weight_decay


def begin_step(
    steps: Tensor, norm: Tensor, settings: AdamWSettings, *, loss: Tensor | None = None
) -> Tensor:
    """Count a step and give the scalars that its update needs, without waiting for the device.

    A step whose norm or loss is not finite is not counted. The powers are taken in float64: in float32
    ``1 - beta2 ** step`` has an error of 1e-5 at the first step.

    Args:
        steps: float32 [k], how many steps there were, all equal; one is added.
        norm: float32 [], the norm of the divided gradient.
        settings: of the step.
        loss: float [], whose gradient it is; None where it is known to be finite.

    Returns:
        float32 [3]: the learning rate over the first moment's correction; one over the root of the
        second's; and what the gradient is multiplied by, NaN where the step is to change nothing.
    """
    finite = torch.isfinite(norm)
    if loss is not None:
        finite = finite & torch.isfinite(loss)
    steps.add_(finite)
    corrections = 1 - _betas(settings.beta1, settings.beta2, steps.device) ** steps[0].double()
    # As `torch.nn.utils.clip_grad_norm_` does it.
    clipping = (settings.max_grad_norm / (norm.double() + 1e-6)).clamp(max=1.0)
    factor = clipping / settings.gradient_divisor
    return torch.stack(
        (
            settings.learning_rate / corrections[0],
            corrections[1].rsqrt(),
            torch.where(finite, factor, torch.nan),
        )
    ).float()


@cache
def _betas(beta1: float, beta2: float, device: torch.device) -> Tensor:
    """Give both on ``device``, once: a copy to a GPU would wait for it at every step."""
    return torch.tensor([beta1, beta2], dtype=torch.float64, device=device)
