"""LoraConfig: what adapter to train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qlora_core.errors import ConfigError


@dataclass(frozen=True)
class LoraConfig:
    """A LoRA adapter: ``y = W x + (alpha / r) * B A dropout(x)``.

    Attributes:
        r: rank, at least 1.
        alpha: scale of the update before division by r, above 0.
        dropout: probability of dropping an input of A while training, in [0, 1).
        target_modules: "all-linear" for every linear layer but the output head, or names: each a
            module's short name ("q_proj") or the dotted end of its path ("self_attn.q_proj").

    Raises:
        ConfigError: a value is out of its bounds.

    Source: LoRA, arXiv:2106.09685.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"LoRA's r must be at least 1, not {self.r}")
        if self.alpha <= 0:
            raise ConfigError(f"LoRA's alpha must be above 0, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"LoRA's dropout must be in [0, 1), not {self.dropout}")
        if self.target_modules == "all-linear":
            return
        if isinstance(self.target_modules, str) or not self.target_modules:
            raise ConfigError(
                'LoRA\'s target_modules must be "all-linear" or a list of names, '
                f"not {self.target_modules!r}"
            )
        # A list from JSON is as good; the frozen config keeps a tuple.
        object.__setattr__(self, "target_modules", tuple(self.target_modules))

    @property
    def scaling(self) -> float:
        """The factor on the update, alpha / r."""
        return self.alpha / self.r
