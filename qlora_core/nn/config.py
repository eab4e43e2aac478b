"""LoraConfig: what adapter to train, in PEFT's words and with PEFT's meaning of them.

Only ``alpha`` and ``dropout`` are shorter than PEFT's ``lora_alpha`` and ``lora_dropout``; `LoraConfig.from_dict` takes
both spellings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self, TypeVar

from qlora_core.errors import ConfigError
from qlora_core.quoting import shown

ALL_LINEAR = "all-linear"

_MOST_RANK = 2**16
_MOST_ALPHA = 2.0**20
_PEFT_SPELLING = {"lora_alpha": "alpha", "lora_dropout": "dropout"}

Value = TypeVar("Value")


@dataclass(frozen=True)
class LoraConfig:
    """A LoRA adapter: ``y = W x + scaling * B A dropout(x)``, with ``scaling = alpha / r``.

    Modules are named by their path in the model, such as ``model.layers.0.self_attn.q_proj``. A list of names means
    every module whose path is one of them or ends in a dot and one of them (``q_proj``, ``self_attn.q_proj``); a single
    string is a regular expression for the whole path. The keys of a pattern are regular expressions for the whole path
    or for the end of it that follows a dot; of several that match, the first one counts.

    Attributes:
        r: rank, from 1 to 65,536.
        alpha: scale of the update before division by r, above 0.
        dropout: probability of dropping an input of A while training, in [0, 1).
        target_modules: "all-linear" for every linear layer but the output head, routers' and those that have to stay
            plain (`left_out` names them); or a list of names; or a regular expression.
        exclude_modules: what of these gets no adapter after all: names or a regular expression.
        use_rslora: ``scaling = alpha / sqrt(r)`` instead, so that a higher rank does not learn more slowly.
        rank_pattern: other ranks, by pattern.
        alpha_pattern: other alphas, by pattern.
        modules_to_save: names of embeddings, output head or norms that are trained whole, in float32. If embeddings and
            output head share their matrix, naming one means both, and they go on sharing it.

    Raises:
        ConfigError: a value is of the wrong type or out of its bounds; the message names it.

    Source: LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732; names and matching as in PEFT 0.21.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    exclude_modules: str | tuple[str, ...] = ()
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int], hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float], hash=False)
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_rank("r", self.r)
        _check_alpha("alpha", self.alpha)
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ConfigError(f"LoRA's dropout must be in [0, 1), not {shown(self.dropout)}")
        if not isinstance(self.use_rslora, bool):
            raise ConfigError(
                f"LoRA's use_rslora must be true or false, not {shown(self.use_rslora)}"
            )
        set_frozen = (
            object.__setattr__
        )  # a list from JSON is as good; the frozen config keeps a tuple
        set_frozen(self, "target_modules", _choice("target_modules", self.target_modules))
        if not self.target_modules:
            raise ConfigError(
                f'LoRA\'s target_modules must be "{ALL_LINEAR}", a list of names or a regular '
                "expression, not empty"
            )
        set_frozen(self, "exclude_modules", _choice("exclude_modules", self.exclude_modules or ()))
        set_frozen(self, "modules_to_save", _names("modules_to_save", self.modules_to_save or ()))
        set_frozen(self, "rank_pattern", _pattern("rank_pattern", self.rank_pattern or {}))
        set_frozen(self, "alpha_pattern", _pattern("alpha_pattern", self.alpha_pattern or {}))
        for key, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern for {key!r}", rank)
        for key, alpha in self.alpha_pattern.items():
            _check_alpha(f"alpha_pattern for {key!r}", alpha)

    @property
    def scaling(self) -> float:
        """The factor on the update of a module that no pattern names."""
        return scaling_of(self.r, self.alpha, use_rslora=self.use_rslora)

    def rank_of(self, path: str) -> int:
        """Give the rank of the adapter over the module at ``path``."""
        return first_match(self.rank_pattern, path, default=self.r)

    def alpha_of(self, path: str) -> float:
        """Give the alpha of the adapter over the module at ``path``."""
        return first_match(self.alpha_pattern, path, default=self.alpha)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make one from JSON or TOML; left-out fields keep their defaults.

        Raises:
            ConfigError: a field is unknown or given twice, or a value is wrong.
        """
        known = {one.name for one in fields(cls)}
        settings: dict[str, Any] = {}
        for name, value in values.items():
            own = _PEFT_SPELLING.get(name, name)
            if own not in known:
                raise ConfigError(f"LoRA has no setting {name}; it has {', '.join(sorted(known))}")
            if own in settings:
                raise ConfigError(f"LoRA's {own} is given twice, as {own} and as lora_{own}")
            settings[own] = value
        return cls(**settings)

    def as_dict(self) -> dict[str, Any]:
        """Give it as JSON-able values that `from_dict` takes."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


def scaling_of(r: int, alpha: float, *, use_rslora: bool) -> float:
    """Give the factor on an update of rank ``r``."""
    return alpha / (math.sqrt(r) if use_rslora else r)


def first_match(pattern: Mapping[str, Value], path: str, *, default: Value) -> Value:
    """Give the value of the first key that matches the path or the end of it that follows a dot.

    Source: PEFT 0.21, ``peft.utils.other.get_pattern_key``.
    """
    for key, value in pattern.items():
        if pattern_matches(key, path):
            return value
    return default


def pattern_matches(key: str, path: str) -> bool:
    """Whether a pattern's key matches the path or the end of it that follows a dot."""
    return re.match(rf"(.*\.)?({key})$", path) is not None


def matching(paths: Iterable[str], name: str) -> list[str]:
    """Give the paths that a name in a list means."""
    return [path for path in paths if path == name or path.endswith(f".{name}")]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_rank(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_RANK:
        raise ConfigError(
            f"LoRA's {name} must be a whole number from 1 to {_MOST_RANK}, not {shown(value)}"
        )


def _check_alpha(name: str, value: Any) -> None:  # noqa: ANN401 - whatever JSON held
    if not _is_number(value) or not 0 < value <= _MOST_ALPHA:
        raise ConfigError(
            f"LoRA's {name} must be a number above 0, up to {_MOST_ALPHA:.0f}, not {shown(value)}"
        )


def _choice(name: str, value: Any) -> str | tuple[str, ...]:  # noqa: ANN401 - whatever JSON held
    if not isinstance(value, str):
        return _names(name, value)
    if value != ALL_LINEAR:
        _check_expression(name, value)
    elif name == "exclude_modules":
        raise ConfigError(f'LoRA\'s exclude_modules cannot be "{ALL_LINEAR}"')
    return value


def _names(name: str, value: Any) -> tuple[str, ...]:  # noqa: ANN401 - whatever JSON held
    names = None if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    if names is None or not all(isinstance(one, str) and one for one in names):
        raise ConfigError(f"LoRA's {name} must be a list of names, not {shown(value)}")
    return tuple(dict.fromkeys(names))


def _pattern(name: str, value: Any) -> dict[str, Any]:  # noqa: ANN401 - whatever JSON held
    if not isinstance(value, Mapping) or not all(isinstance(key, str) and key for key in value):
        raise ConfigError(
            f"LoRA's {name} must map names or regular expressions to values, not {shown(value)}"
        )
    for key in value:
        _check_expression(name, key)
    return dict(value)


def _check_expression(name: str, expression: str) -> None:
    try:
        re.compile(f"({expression})")
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"LoRA's {name} has {shown(expression)}, which is no regular expression: {error}"
        ) from error
