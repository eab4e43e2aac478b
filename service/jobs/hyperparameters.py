"""The hyperparameters a job may ask for: their names, aliases and bounds.

Every field may be absent, null or "auto"; all three mean the same, and `resolve` turns them into numbers. `as_sent`
holds only what was really given, under its one name.
"""

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from service.jobs.bounds import (
    choice,
    flag,
    module_names,
    modules,
    number,
    schema,
    whole,
    words,
)

ALIASES = {
    "target_modules": "lora_target_modules",
    "lora_trainable_modules": "lora_target_modules",
    "exclude_modules": "lora_exclude_modules",
    "use_rslora": "lora_use_rslora",
    "max_seq_length": "context_length",
}
"""Spellings of other vendors, and the one we keep."""

Auto = Literal["auto"]
SCHEDULERS = ("linear", "cosine", "constant")
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")


class Hyperparameters(BaseModel):
    """What to train with; absent, null and "auto" let the service choose."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    n_epochs: Annotated[
        int | Auto | None,
        BeforeValidator(whole(1, 50)),
        schema("integer", minimum=1, maximum=50),
    ] = None
    """Passes over the training file."""
    max_steps: Annotated[
        int | Auto | None,
        BeforeValidator(whole(1, 10_000_000)),
        schema("integer", minimum=1, maximum=10_000_000),
    ] = None
    """End after so many optimizer steps, if the epochs have not ended before."""
    batch_size: Annotated[
        int | Auto | None,
        BeforeValidator(whole(1, 256)),
        schema("integer", minimum=1, maximum=256),
    ] = None
    """Examples per optimizer step."""
    learning_rate_multiplier: Annotated[
        float | Auto | None,
        BeforeValidator(number(0, 5000, above=True)),
        schema("number", exclusiveMinimum=0, maximum=5000),
    ] = None
    """Times the base learning rate, 2e-4."""
    learning_rate: Annotated[
        float | Auto | None,
        BeforeValidator(number(0, 1, above=True)),
        schema("number", exclusiveMinimum=0, maximum=1),
    ] = None
    """The peak learning rate itself; wins over the multiplier."""
    max_time_s: Annotated[
        int | Auto | None,
        BeforeValidator(whole(1, 31_536_000)),
        schema("integer", minimum=1, maximum=31_536_000),
    ] = None
    """Fail with time_limit after so many seconds of training, all attempts together."""
    lora_r: Annotated[
        int | Auto | None,
        BeforeValidator(whole(1, 256)),
        schema("integer", minimum=1, maximum=256),
    ] = None
    """Rank of the adapter's matrices."""
    lora_alpha: Annotated[
        float | Auto | None,
        BeforeValidator(number(0, 4096, above=True)),
        schema("number", exclusiveMinimum=0, maximum=4096),
    ] = None
    """The adapter's output is scaled by lora_alpha / lora_r."""
    lora_dropout: Annotated[
        float | Auto | None,
        BeforeValidator(number(0, 0.9)),
        schema("number", minimum=0, maximum=0.9),
    ] = None
    """Of the adapter's input, while training."""
    lora_target_modules: Annotated[
        list[str] | Literal["auto", "all-linear"] | None,
        BeforeValidator(modules("all-linear")),
        module_names("all-linear"),
    ] = None
    """Which linears get an adapter."""
    lora_exclude_modules: Annotated[
        list[str] | Auto | None, BeforeValidator(modules()), module_names()
    ] = None
    """Which of these get none after all."""
    lora_use_rslora: Annotated[bool | Auto | None, BeforeValidator(flag), schema("boolean")] = None
    """Scale the adapter's output by lora_alpha / sqrt(lora_r) instead, so that high ranks learn as fast."""
    warmup_ratio: Annotated[
        float | Auto | None,
        BeforeValidator(number(0, 1)),
        schema("number", minimum=0, maximum=1),
    ] = None
    """The part of all steps in which the learning rate rises from nothing to its peak."""
    warmup_steps: Annotated[
        int | Auto | None,
        BeforeValidator(whole(0, 1_000_000)),
        schema("integer", minimum=0, maximum=1_000_000),
    ] = None
    """The same in steps; give one of the two."""
    lr_scheduler_type: Annotated[
        str | None, BeforeValidator(choice(*SCHEDULERS)), words(*SCHEDULERS)
    ] = None
    """How the learning rate falls after that."""
    weight_decay: Annotated[
        float | Auto | None,
        BeforeValidator(number(0, 1)),
        schema("number", minimum=0, maximum=1),
    ] = None
    max_grad_norm: Annotated[
        float | Auto | None,
        BeforeValidator(number(0, 1000, above=True)),
        schema("number", exclusiveMinimum=0, maximum=1000),
    ] = None
    """Gradients longer than this are scaled down to it."""
    context_length: Annotated[
        int | Auto | None,
        BeforeValidator(whole(16, 1_048_576)),
        schema("integer", minimum=16, maximum=1_048_576),
    ] = None
    """Tokens of an example that are used; at most what the model was made for."""
    train_on_inputs: Annotated[bool | Auto | None, BeforeValidator(flag), schema("boolean")] = None
    """Train the prompts, too, not the answers alone."""
    packing: Annotated[bool | Auto | None, BeforeValidator(flag), schema("boolean")] = None
    """Compute several examples in one row, kept apart, instead of padding them; the result is the same."""
    eval_steps: Annotated[
        int | Auto | None,
        BeforeValidator(whole(0, 1_000_000)),
        schema("integer", minimum=0, maximum=1_000_000),
    ] = None
    """Validate after every so many steps, besides each epoch's end; 0 for these alone."""
    early_stopping_patience: Annotated[
        int | Auto | None,
        BeforeValidator(whole(0, 1_000)),
        schema("integer", minimum=0, maximum=1_000),
    ] = None
    """End when so many validations in a row have not been better than the best; 0 for never."""
    load_best_at_end: Annotated[bool | Auto | None, BeforeValidator(flag), schema("boolean")] = None
    """Offer the adapter of the best validation instead of the last; "auto": where early_stopping_patience is set."""
    optimizer: Annotated[str | None, BeforeValidator(choice(*OPTIMIZERS)), words(*OPTIMIZERS)] = (
        None
    )
    """What takes the steps: AdamW with moments in 32 bits or, in a quarter of the memory, in 8; paged ones are on the GPU for the step only."""

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
