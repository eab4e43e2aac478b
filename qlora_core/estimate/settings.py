"""The settings of a run as the estimate reads them: names and defaults of `TrainConfig` and `LoraConfig`, without torch.

Every name those two know is accepted; only what memory and time depend on is kept. A test holds the names and defaults
to theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, Protocol

from qlora_core.errors import ConfigError
from qlora_core.estimate.optimizers import OPTIMIZERS

ALL_LINEAR = "all-linear"

_PEFT_SPELLING = {"lora_alpha": "alpha", "lora_dropout": "dropout"}
_LORA_WITHOUT_BYTES = ("alpha", "use_rslora", "alpha_pattern")
_TRAIN_WITHOUT_BYTES = (
    "n_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps", "weight_decay",
    "max_grad_norm", "eval_steps", "train_on_inputs", "seed", "resume_point_every_s",
)  # fmt: skip
_MOST_RANK = 2**16


class HasDict(Protocol):
    """What a `TrainConfig` is to the estimate."""

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-able values."""
        ...


@dataclass(frozen=True)
class LoraSettings:
    """What of an adapter's settings takes memory; as in `LoraConfig`."""

    r: int = 16
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    exclude_modules: str | tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_rank("r", self.r)
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ConfigError(f"LoRA's dropout must be in [0, 1), not {self.dropout!r}")
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            _check_names(name, getattr(self, name))
        if not self.target_modules:
            raise ConfigError("LoRA's target_modules must not be empty")
        if not isinstance(self.rank_pattern, Mapping):
            raise ConfigError(
                f"LoRA's rank_pattern must map names to ranks, not {self.rank_pattern!r}"
            )
        for pattern, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern for {pattern!r}", rank)
            _check_expression("rank_pattern", pattern)

    def rank_of(self, path: str) -> int:
        """Give the rank of the adapter over the layer at ``path``."""
        for pattern, rank in self.rank_pattern.items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                return rank
        return self.r


@dataclass(frozen=True)
class TrainSettings:
    """What of a run's settings takes memory or time; as in `TrainConfig`."""

    batch_size: int = 8
    context_length: int = 2048
    packing: bool = True
    gradient_checkpointing: bool = True
    micro_batch_tokens: int = 4096
    early_stopping_patience: int = 0
    load_best_at_end: bool | None = None
    optimizer: str = "adamw"
    lora: LoraSettings = field(default_factory=LoraSettings)

    def __post_init__(self) -> None:
        check_integer("batch_size", self.batch_size, 1, 4096)
        check_integer("context_length", self.context_length, 2, 2**24)
        check_integer("micro_batch_tokens", self.micro_batch_tokens, 1, 2**31 - 1)
        check_integer("early_stopping_patience", self.early_stopping_patience, 0, 2**31 - 1)
        for name in ("packing", "gradient_checkpointing", "load_best_at_end"):
            may_be_none = name == "load_best_at_end"
            if not isinstance(getattr(self, name), (bool, NoneType) if may_be_none else bool):
                raise ConfigError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if not isinstance(self.optimizer, str) or self.optimizer not in OPTIMIZERS:
            names = ", ".join(OPTIMIZERS)
            raise ConfigError(f"optimizer must be one of {names}, not {self.optimizer!r}")

    @property
    def keeps_best(self) -> bool:
        """Whether a resume point holds the best adapter, too."""
        if self.load_best_at_end is None:
            return self.early_stopping_patience > 0
        return self.load_best_at_end


def read_settings(config: Mapping[str, Any] | HasDict | None) -> TrainSettings:
    """Take what the estimate needs out of a run's settings.

    Raises:
        ConfigError: a setting is unknown, or one that counts has a wrong value; the message names it.
    """
    if config is None:
        return TrainSettings()
    if not isinstance(config, Mapping):
        if not hasattr(config, "as_dict"):
            raise ConfigError(f"settings must be a table or a TrainConfig, not {config!r}")
        config = config.as_dict()
    values = dict(config)
    lora = values.pop("lora", None) or {}
    if not isinstance(lora, Mapping):
        raise ConfigError(f"lora must be a table of settings, not {type(lora).__name__}")
    counted = _counted(values, TrainSettings, _TRAIN_WITHOUT_BYTES, "a run")
    return TrainSettings(**counted, lora=_read_lora(lora))


def check_integer(name: str, value: object, low: int, high: int) -> None:
    """Refuse what is no whole number from ``low`` to ``high``.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} must be a whole number from {low} to {high}, not {value!r}")


def _read_lora(values: Mapping[str, Any]) -> LoraSettings:
    own: dict[str, Any] = {}
    for name, value in values.items():
        if _PEFT_SPELLING.get(name, name) in own:
            raise ConfigError(f"LoRA's {_PEFT_SPELLING.get(name, name)} is given twice")
        own[_PEFT_SPELLING.get(name, name)] = value
    counted = _counted(own, LoraSettings, _LORA_WITHOUT_BYTES, "LoRA")
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        if name in counted and not isinstance(counted[name], str):
            counted[name] = _as_names(name, counted[name])
    return LoraSettings(**{**counted, "rank_pattern": counted.get("rank_pattern") or {}})


def _counted(
    values: Mapping[str, Any], settings: type, others: tuple[str, ...], owner: str
) -> dict[str, Any]:
    known = [one.name for one in fields(settings)]
    unknown = sorted(str(name) for name in values if name not in known and name not in others)
    if unknown:
        names = ", ".join(sorted({*known, *others}))
        raise ConfigError(f"{owner} has no setting {', '.join(unknown)}; it has {names}")
    return {name: value for name, value in values.items() if name in known}


def _as_names(name: str, value: object) -> tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, Iterable):
        raise ConfigError(f"LoRA's {name} must be a list of names, not {value!r}")
    return tuple(value)


def _check_names(name: str, value: str | tuple[str, ...]) -> None:
    if isinstance(value, str) and name != "modules_to_save":
        if value != ALL_LINEAR:
            _check_expression(name, value)
    elif isinstance(value, str) or not all(isinstance(one, str) and one for one in value):
        raise ConfigError(f"LoRA's {name} must be a list of names, not {value!r}")


def _check_expression(name: str, expression: str) -> None:
    try:
        re.compile(f"({expression})")
    except re.error as error:
        raise ConfigError(
            f"LoRA's {name} has {expression!r}, which is no regular expression: {error}"
        ) from error


def _check_rank(name: str, value: object) -> None:
    check_integer(f"LoRA's {name}", value, 1, _MOST_RANK)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
