"""TrainConfig: every setting of a run, checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from qlora_core.errors import ConfigError
from qlora_core.nn import LoraConfig
from qlora_core.optim import OPTIMIZERS, SCHEDULES, warmup_share
from qlora_core.quoting import shown

DEFAULT_WARMUP_RATIO = 0.03

# Smallest and largest of each.
_INTEGERS = {
    "n_epochs": (1, 1000),
    "max_steps": (1, 2**31 - 1),
    "batch_size": (1, 4096),
    "warmup_steps": (0, 2**31 - 1),
    "eval_steps": (0, 2**31 - 1),
    "early_stopping_patience": (0, 2**31 - 1),
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
    "resume_point_every_s": (0.0, 1e9, True),
}
_CHOICES = {"lr_scheduler_type": SCHEDULES, "optimizer": OPTIMIZERS}
_FLAGS = ("load_best_at_end", "train_on_inputs", "packing", "gradient_checkpointing")
_MAY_BE_NONE = ("max_steps", "warmup_ratio", "warmup_steps", "load_best_at_end")


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run.

    Attributes:
        n_epochs: passes over the dataset.
        max_steps: the run ends after so many optimizer steps at the latest; the schedule ends there too.
        batch_size: examples per optimizer step.
        learning_rate: the highest of the schedule.
        lr_scheduler_type: what follows the warm-up.
        warmup_ratio: share of all steps over which the learning rate rises; 0.03 where neither this
            nor ``warmup_steps`` is given.
        warmup_steps: the same in steps; give one of the two.
        weight_decay: decoupled, of the adapter's tensors.
        max_grad_norm: gradients are scaled down to this norm.
        eval_steps: the validation set is measured after every so many steps, besides each epoch's end
            and the run's; 0 for these alone.
        early_stopping_patience: the run ends when so many validations in a row have not been better
            than the best before them; 0 for never.
        load_best_at_end: offer the adapter of the best validation instead of the last step's; None
            for what goes with ``early_stopping_patience``: the best where it is set, else the last.
        context_length: tokens; what examples were cut to.
        train_on_inputs: what examples were encoded with: whether their prompts are trained, too.
        seed: of the adapter's start, the order of the data, and dropout.
        optimizer: by name. "adamw" by default: 8 bits, whose losses three seeds do not tell from those of
            32, save a few percent of a usual run's memory; "paged_adamw" saves more of it and rounds
            nothing (docs/formats/optimizer.md).
        packing: put the examples of a forward pass one after the other, kept apart, instead of padding them;
            the same result, sooner.
        gradient_checkpointing: compute activations twice instead of keeping them.
        micro_batch_tokens: tokens per forward pass, padding counted; bounds memory, not the result.
        resume_point_every_s: a resume point is written when so long has passed since the last one, beside
            those at each epoch's end.
        lora: the adapter.

    Raises:
        ConfigError: a value is of the wrong type or out of its bounds; the message names the field.
    """

    n_epochs: int = 3
    max_steps: int | None = None
    batch_size: int = 8
    learning_rate: float = 2e-4
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float | None = None
    warmup_steps: int | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    eval_steps: int = 0
    early_stopping_patience: int = 0
    load_best_at_end: bool | None = None
    context_length: int = 2048
    train_on_inputs: bool = False
    seed: int = 0
    optimizer: str = "adamw"
    packing: bool = True
    gradient_checkpointing: bool = True
    micro_batch_tokens: int = 4096
    resume_point_every_s: float = 600.0
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value is not None or setting.name not in _MAY_BE_NONE:
                _check(setting.name, value)
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ConfigError("warmup_ratio and warmup_steps are both given; keep one of them")

    @property
    def keeps_best(self) -> bool:
        """Whether the adapter of the best validation is the one offered at the end."""
        if self.load_best_at_end is None:
            return self.early_stopping_patience > 0
        return self.load_best_at_end

    def warmup_length(self, total_steps: int) -> int:
        """Return the steps of warm-up in a run of ``total_steps``."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        ratio = DEFAULT_WARMUP_RATIO if self.warmup_ratio is None else self.warmup_ratio
        return warmup_share(ratio, total_steps)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Make one from what ``as_dict`` gives; left-out fields keep their defaults.

        Raises:
            ConfigError: a field is unknown, or a value is wrong.
        """
        values = dict(values)
        unknown = sorted(set(values) - {setting.name for setting in fields(cls)})
        if unknown:
            raise ConfigError(f"unknown setting {', '.join(map(str, unknown))}")
        if isinstance(values.get("lora"), Mapping):
            values["lora"] = LoraConfig.from_dict(values["lora"])
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON-able values."""
        return {**asdict(self), "lora": self.lora.as_dict()}


def _check(name: str, value: object) -> None:
    if name in _INTEGERS:
        _check_integer(name, value, *_INTEGERS[name])
    elif name in _NUMBERS:
        low, high, closed = _NUMBERS[name]
        _check_number(name, value, low, high, closed=closed)
    elif name in _CHOICES:
        if value not in _CHOICES[name]:
            raise ConfigError(
                f"{name} must be one of {', '.join(_CHOICES[name])}, not {shown(value)}"
            )
    elif name in _FLAGS:
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be true or false, not {shown(value)}")
    elif not isinstance(value, LoraConfig):
        raise ConfigError(f"lora must be a LoraConfig, not {type(value).__name__}")


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} must be a whole number from {low} to {high}, not {shown(value)}")


def _check_number(name: str, value: object, low: float, high: float, *, closed: bool) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    # NaN is within no bounds.
    if not good or not low <= value <= high or (value == low and not closed):  # type: ignore[operator]
        bounds = f"from {low:g}" if closed else f"above {low:g} and up"
        raise ConfigError(f"{name} must be a number {bounds} to {high:g}, not {shown(value)}")
