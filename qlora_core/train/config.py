"""TrainConfig: every setting of a run, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from qlora_core.errors import ConfigError
from qlora_core.nn import LoraConfig
from qlora_core.optim import OPTIMIZERS, SCHEDULES

# Smallest and largest of each.
_INTEGERS = {
    "n_epochs": (1, 1000),
    "batch_size": (1, 4096),
    "context_length": (2, 2**24),
    "seed": (0, 2**31 - 1),
    "micro_batch_tokens": (1, 2**31 - 1),
}
# Smallest, largest, and whether the smallest itself is allowed.
_NUMBERS = {
    "learning_rate": (0.0, 10.0, False),
    "warmup_ratio": (0.0, 1.0, True),
    "weight_decay": (0.0, 10.0, True),
    "max_grad_norm": (0.0, 1e6, False),
}
_CHOICES = {"lr_scheduler_type": SCHEDULES, "optimizer": OPTIMIZERS}


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run.

    Attributes:
        n_epochs: passes over the dataset.
        batch_size: examples per optimizer step.
        learning_rate: the highest of the schedule.
        lr_scheduler_type: what follows the warm-up.
        warmup_ratio: share of all steps over which the learning rate rises.
        weight_decay: decoupled, of the adapter's tensors.
        max_grad_norm: gradients are scaled down to this norm.
        context_length: tokens; what examples were cut to.
        seed: of the adapter's start, the order of the data, and dropout.
        optimizer: by name.
        gradient_checkpointing: compute activations twice instead of keeping them.
        micro_batch_tokens: padded tokens per forward pass; bounds memory, not the result.
        lora: the adapter.

    Raises:
        ConfigError: a value is of the wrong type or out of its bounds; the message names the field.
    """

    n_epochs: int = 3
    batch_size: int = 8
    learning_rate: float = 2e-4
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    context_length: int = 2048
    seed: int = 0
    optimizer: str = "adamw"
    gradient_checkpointing: bool = True
    micro_batch_tokens: int = 4096
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        for name, (low, high) in _INTEGERS.items():
            _check_integer(name, getattr(self, name), low, high)
        for name, (low, high, closed) in _NUMBERS.items():
            _check_number(name, getattr(self, name), low, high, closed=closed)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}"
                )
        if not isinstance(self.gradient_checkpointing, bool):
            raise ConfigError(
                f"gradient_checkpointing must be true or false, not {self.gradient_checkpointing!r}"
            )
        if not isinstance(self.lora, LoraConfig):
            raise ConfigError(f"lora must be a LoraConfig, not {type(self.lora).__name__}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Make one from what ``as_dict`` gives; left-out fields keep their defaults.

        Raises:
            ConfigError: a field is unknown, or a value is wrong.
        """
        values = dict(values)
        _refuse_unknown(values, cls, "")
        lora = values.get("lora")
        if isinstance(lora, Mapping):
            _refuse_unknown(lora, LoraConfig, "lora.")
            try:
                values["lora"] = LoraConfig(**lora)
            except TypeError as error:
                raise ConfigError(f"lora has a value of the wrong type: {error}") from error
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON-able values."""
        values = asdict(self)
        targets = values["lora"]["target_modules"]
        values["lora"]["target_modules"] = targets if isinstance(targets, str) else list(targets)
        return values


def _refuse_unknown(values: Mapping[str, Any], kind: type[Any], prefix: str) -> None:
    unknown = sorted(set(values) - {known.name for known in fields(kind)})
    if unknown:
        raise ConfigError(f"unknown setting {', '.join(prefix + str(name) for name in unknown)}")


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} must be a whole number from {low} to {high}, not {value!r}")


def _check_number(name: str, value: object, low: float, high: float, *, closed: bool) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high or (value == low and not closed):  # type: ignore[operator]
        bounds = f"from {low:g}" if closed else f"above {low:g} and up"
        raise ConfigError(f"{name} must be a number {bounds} to {high:g}, not {value!r}")
