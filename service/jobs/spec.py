"""The body of a create call: OpenAI's fields and bounds, and our extras.

Shape is checked here; whether the model and the files exist is checked in `actions`; what the files hold is checked by
the job itself, in `validating_files`.
"""

import re
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    StrictStr,
    StringConstraints,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from service.jobs.hyperparameters import Hyperparameters

MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512
MAX_SAMPLE_PROMPTS = 8
MAX_SAMPLE_MESSAGES = 32
MAX_SAMPLE_CHARACTERS = 16_000
MAX_SEED = 2**31 - 1
SUFFIX = r"[A-Za-z0-9._-]{1,64}"
"""No ":", which separates the parts of a model's name, and no "/", which separates the parts of a path."""


def _suffix(value: str | None) -> str | None:
    if value is not None and not re.fullmatch(SUFFIX, value):
        raise PydanticCustomError(
            "suffix", "must be 1 to 64 letters, digits, dots, dashes or underscores"
        )
    return value


def _seed(value: object) -> object:
    if value is None:
        return value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEED:
        raise PydanticCustomError(
            "seed", "must be a whole number from 0 to {high}", {"high": MAX_SEED}
        )
    return value


def _metadata(value: object) -> object:
    if value is None:
        return value
    pairs = cast("dict[str, object]", value) if isinstance(value, dict) else None
    if pairs is None or len(pairs) > MAX_METADATA_PAIRS:
        raise PydanticCustomError(
            "metadata",
            "must be an object of at most {pairs} pairs",
            {"pairs": MAX_METADATA_PAIRS},
        )
    for key, content in pairs.items():
        if len(key) > MAX_METADATA_KEY:
            raise PydanticCustomError(
                "metadata",
                "has a key of {length} characters; {limit} are allowed",
                {"length": len(key), "limit": MAX_METADATA_KEY},
            )
        if not isinstance(content, str) or len(content) > MAX_METADATA_VALUE:
            raise PydanticCustomError(
                "metadata",
                "must have values that are strings of at most {limit} characters; {key} has not",
                {"limit": MAX_METADATA_VALUE, "key": key},
            )
    return pairs


class SampleMessage(BaseModel):
    """One message of a conversation that a sample is asked to continue."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: StrictStr


def _samples(value: object) -> object:
    if value is None:
        return value
    prompts = cast("list[object]", value) if isinstance(value, list) else None
    if prompts is None or len(prompts) > MAX_SAMPLE_PROMPTS:
        raise PydanticCustomError(
            "sample_prompts",
            "must be a list of at most {limit} prompts",
            {"limit": MAX_SAMPLE_PROMPTS},
        )
    return [_conversation(prompt) for prompt in prompts]


def _conversation(prompt: object) -> list[object]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    messages = cast("list[object]", prompt) if isinstance(prompt, list) else []
    if not 1 <= len(messages) <= MAX_SAMPLE_MESSAGES:
        raise PydanticCustomError(
            "sample_prompts",
            "must hold strings, or lists of 1 to {limit} messages",
            {"limit": MAX_SAMPLE_MESSAGES},
        )
    return messages


def _within_length(value: list[list[SampleMessage]] | None) -> list[list[SampleMessage]] | None:
    for messages in value or []:
        length = sum(len(message.content) for message in messages)
        if not 1 <= length <= MAX_SAMPLE_CHARACTERS:
            raise PydanticCustomError(
                "sample_prompts",
                "must hold prompts of 1 to {limit} characters; one has {length}",
                {"limit": MAX_SAMPLE_CHARACTERS, "length": length},
            )
        if messages[-1].role == "assistant":
            raise PydanticCustomError(
                "sample_prompts", "must hold prompts that do not end with an assistant's message"
            )
    return value


class Supervised(BaseModel):
    """Supervised fine-tuning's own block."""

    model_config = ConfigDict(extra="forbid")

    hyperparameters: Hyperparameters | None = None


class Method(BaseModel):
    """How to train. Of the three blocks, the one that `type` names counts."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: dict[str, Any] | None = None
    reinforcement: dict[str, Any] | None = None


_SAMPLES_SCHEMA = {
    "anyOf": [
        {
            "type": "array",
            "maxItems": MAX_SAMPLE_PROMPTS,
            "items": {
                "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]
            },
        },
        {"type": "null"},
    ]
}

FileId = Annotated[StrictStr, StringConstraints(min_length=1, max_length=200)]


class CreateJob(BaseModel):
    """A fine-tuning job to create."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: Annotated[StrictStr, StringConstraints(min_length=1, max_length=500)]
    """The id of a base model, as `GET /v1/models` lists it."""
    training_file: FileId
    """The id of an uploaded file whose purpose is `fine-tune`."""
    validation_file: FileId | None = None
    """The id of another, for validation metrics."""
    suffix: Annotated[
        StrictStr | None,
        AfterValidator(_suffix),
        WithJsonSchema({"anyOf": [{"type": "string", "pattern": f"^{SUFFIX}$"}, {"type": "null"}]}),
    ] = None
    """A part of the fine-tuned model's name: letters, digits, dots, dashes, underscores."""
    seed: Annotated[
        int | None,
        BeforeValidator(_seed),
        WithJsonSchema(
            {"anyOf": [{"type": "integer", "minimum": 0, "maximum": MAX_SEED}, {"type": "null"}]}
        ),
    ] = None
    """The same seed and the same job give the same adapter. Made up when absent."""
    metadata: Annotated[dict[str, str] | None, BeforeValidator(_metadata)] = None
    """Up to 16 pairs of strings, to find the job by."""
    integrations: list[dict[str, Any]] | None = None
    """Must be empty: none is supported yet."""
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    """OpenAI's older place for `method.supervised.hyperparameters`; where both are given, the method's count."""
    sample_prompts: Annotated[
        list[list[SampleMessage]] | None,
        BeforeValidator(_samples),
        AfterValidator(_within_length),
        WithJsonSchema(_SAMPLES_SCHEMA),
    ] = None
    """Up to eight prompts, answered by the base model and by the adapter; an event carries the answers."""

    def requested_hyperparameters(self) -> dict[str, Any]:
        """Both places merged, the method's winning."""
        merged = self.hyperparameters.as_sent() if self.hyperparameters else {}
        block = self.method.supervised if self.method else None
        if block is not None and block.hyperparameters is not None:
            merged |= block.hyperparameters.as_sent()
        return merged

    def conversations(self) -> list[list[dict[str, str]]]:
        """The sample prompts as lists of messages."""
        return [[m.model_dump() for m in messages] for messages in self.sample_prompts or []]
