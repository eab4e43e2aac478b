"""The hyperparameters a job may ask for: their names, aliases and bounds.

Every field may be absent, null or "auto"; all three mean the same, and `resolve` turns them into numbers. `as_sent`
holds only what was really given, under its one name.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

ALIASES = {
    "target_modules": "lora_target_modules",
    "lora_trainable_modules": "lora_target_modules",
    "max_seq_length": "context_length",
}
"""Spellings of other vendors, and the one we keep."""

MAX_TARGET_MODULES = 64
MAX_MODULE_NAME = 200


def _refuse(want: str, got: object) -> PydanticCustomError:
    shown = repr(got) if isinstance(got, str) else str(got)
    return PydanticCustomError(
        "out_of_bounds", "must be {want}; got {got}", {"want": want, "got": shown[:80]}
    )


def _whole(low: int, high: int) -> Callable[[object], object]:
    want = f'"auto" or a whole number from {low} to {high}'

    def check(value: object) -> object:
        if value is None or value == "auto":
            return value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _refuse(want, value)
        return value

    return check


def _number(low: float, high: float, *, above: bool = False) -> Callable[[object], object]:
    """`above`: `low` itself is refused."""
    want = f'"auto" or a number {"above" if above else "from"} {low:g} {"up " if above else ""}to {high:g}'

    def check(value: object) -> object:
        if value is None or value == "auto":
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _refuse(want, value)
        if not low <= value <= high or (above and value == low) or not math.isfinite(value):
            raise _refuse(want, value)
        return float(value)

    return check


def _choice(*choices: str) -> Callable[[object], object]:
    want = " or ".join(f'"{choice}"' for choice in ("auto", *choices))

    def check(value: object) -> object:
        if value is None or value == "auto" or value in choices:
            return value
        raise _refuse(want, value)

    return check


def _modules(value: object) -> object:
    want = (
        f'"auto", "all-linear" or a list of 1 to {MAX_TARGET_MODULES} module names such as "q_proj"'
    )
    if value is None or value in ("auto", "all-linear"):
        return value
    if not isinstance(value, list):
        raise _refuse(want, value)
    names = cast("list[object]", value)
    if not 1 <= len(names) <= MAX_TARGET_MODULES:
        raise _refuse(want, names)
    if not all(isinstance(name, str) and 1 <= len(name) <= MAX_MODULE_NAME for name in names):
        raise _refuse(want, names)
    return list(dict.fromkeys(names))


def _schema(type_: str, **bounds: float) -> WithJsonSchema:
    return WithJsonSchema(
        {"anyOf": [{"const": "auto"}, {"type": type_, **bounds}, {"type": "null"}]}
    )


def _words(*choices: str) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"enum": ["auto", *choices]}, {"type": "null"}]})


Auto = Literal["auto"]
SCHEDULERS = ("linear", "cosine", "constant")
OPTIMIZERS = ("adamw",)


class Hyperparameters(BaseModel):
    """What to train with; absent, null and "auto" let the service choose."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    n_epochs: Annotated[
        int | Auto | None,
        BeforeValidator(_whole(1, 50)),
        _schema("integer", minimum=1, maximum=50),
    ] = None
    """Passes over the training file."""
    batch_size: Annotated[
        int | Auto | None,
        BeforeValidator(_whole(1, 256)),
        _schema("integer", minimum=1, maximum=256),
    ] = None
    """Examples per optimizer step."""
    learning_rate_multiplier: Annotated[
        float | Auto | None,
        BeforeValidator(_number(0, 5000, above=True)),
        _schema("number", exclusiveMinimum=0, maximum=5000),
    ] = None
    """Times the base learning rate, 2e-4."""
    learning_rate: Annotated[
        float | Auto | None,
        BeforeValidator(_number(0, 1, above=True)),
        _schema("number", exclusiveMinimum=0, maximum=1),
    ] = None
    """The peak learning rate itself; wins over the multiplier."""
    lora_r: Annotated[
        int | Auto | None,
        BeforeValidator(_whole(1, 256)),
        _schema("integer", minimum=1, maximum=256),
    ] = None
    """Rank of the adapter's matrices."""
    lora_alpha: Annotated[
        float | Auto | None,
        BeforeValidator(_number(0, 4096, above=True)),
        _schema("number", exclusiveMinimum=0, maximum=4096),
    ] = None
    """The adapter's output is scaled by lora_alpha / lora_r."""
    lora_dropout: Annotated[
        float | Auto | None,
        BeforeValidator(_number(0, 0.9)),
        _schema("number", minimum=0, maximum=0.9),
    ] = None
    """Of the adapter's input, while training."""
    lora_target_modules: Annotated[
        list[str] | Literal["auto", "all-linear"] | None,
        BeforeValidator(_modules),
        WithJsonSchema(
            {
                "anyOf": [
                    {"enum": ["auto", "all-linear"]},
                    {"type": "array", "items": {"type": "string"}, "minItems": 1},
                    {"type": "null"},
                ]
            }
        ),
    ] = Field(default=None)
    """Which linears get an adapter."""
    warmup_ratio: Annotated[
        float | Auto | None,
        BeforeValidator(_number(0, 1)),
        _schema("number", minimum=0, maximum=1),
    ] = None
    """The part of all steps in which the learning rate rises from nothing to its peak."""
    lr_scheduler_type: Annotated[
        str | None, BeforeValidator(_choice(*SCHEDULERS)), _words(*SCHEDULERS)
    ] = None
    """How the learning rate falls after that."""
    weight_decay: Annotated[
        float | Auto | None,
        BeforeValidator(_number(0, 1)),
        _schema("number", minimum=0, maximum=1),
    ] = None
    max_grad_norm: Annotated[
        float | Auto | None,
        BeforeValidator(_number(0, 1000, above=True)),
        _schema("number", exclusiveMinimum=0, maximum=1000),
    ] = None
    """Gradients longer than this are scaled down to it."""
    context_length: Annotated[
        int | Auto | None,
        BeforeValidator(_whole(16, 1_048_576)),
        _schema("integer", minimum=16, maximum=1_048_576),
    ] = None
    """Tokens of an example that are used; at most what the model was made for."""
    optimizer: Annotated[str | None, BeforeValidator(_choice(*OPTIMIZERS)), _words(*OPTIMIZERS)] = (
        None
    )

    @model_validator(mode="before")
    @classmethod
    def _one_name_each(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        renamed: dict[str, object] = {}
        for sent, content in cast("dict[str, object]", value).items():
            name = ALIASES.get(sent, sent)
            if renamed.get(name) is not None and content is not None and renamed[name] != content:
                raise PydanticCustomError(
                    "ambiguous",
                    "{name} is given twice, under two of its names, with different values",
                    {"name": name},
                )
            if content is not None or name not in renamed:
                renamed[name] = content
        return renamed

    def as_sent(self) -> dict[str, Any]:
        """What was given, under one name each, without nulls."""
        return self.model_dump(exclude_unset=True, exclude_none=True)
