"""A job's request, from the options of `nibble jobs create`.

Numbers' bounds are the service's to judge; here only what cannot be sent at all is refused.
"""

import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from nibble.answers import expect_job
from nibble.endings import refused

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.fine_tuning import FineTuningJob


@dataclass(frozen=True)
class Submission:
    """What a job is asked for; None leaves a choice to the service."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict[str, Any])
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    sample_prompts: tuple[str, ...] = ()

    def body(self) -> dict[str, Any]:
        """The arguments of the SDK's `create`, without what was left open."""
        body: dict[str, Any] = {"model": self.model, "training_file": self.training_file}
        for name in ("validation_file", "suffix", "seed"):
            if (value := getattr(self, name)) is not None:
                body[name] = value
        if self.metadata:
            body["metadata"] = dict(self.metadata)
        method: dict[str, Any] = {"type": "supervised"}
        if self.hyperparameters:
            method["supervised"] = {"hyperparameters": dict(self.hyperparameters)}
        body["method"] = method
        if self.sample_prompts:
            prompts = [[{"role": "user", "content": text}] for text in self.sample_prompts]
            body["extra_body"] = {"sample_prompts": prompts}
        return body


def submit(client: "OpenAI", submission: Submission) -> "FineTuningJob":
    """Create the job. Its Idempotency-Key makes every retry of this call find the first one's job."""
    key = str(uuid.uuid4())
    create: Any = client.fine_tuning.jobs.create  # the service's extras are not in the SDK's types
    return expect_job(create(**submission.body(), extra_headers={"Idempotency-Key": key}))


def pairs(option: str, given: Iterable[str]) -> dict[str, str]:
    """`["team=search"]` as `{"team": "search"}`.

    Raises:
        Ending: one has no "=" or no name, or a name comes twice (refused).
    """
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise refused(f"{option} takes NAME=VALUE, not {text!r}.")
        if name in found:
            raise refused(f"{option} names {name!r} twice.")
        found[name] = value
    return found


def hyperparameters(named: Mapping[str, Any], others: Iterable[str]) -> dict[str, Any]:
    """Those given by their own options and by `--hyperparameter NAME=VALUE` (JSON, else text) together.

    Raises:
        Ending: one is given in both ways, or is not NAME=VALUE (refused).
    """
    merged = {name: value for name, value in named.items() if value is not None}
    for name, text in pairs("--hyperparameter", others).items():
        if name in merged:
            raise refused(f"{name} is given both by its own option and by --hyperparameter.")
        merged[name] = _json_or_text(text)
    return merged


def number_or_auto(text: str) -> int | float | str:
    """An option's number, or "auto".

    Raises:
        ValueError: it is neither.
    """
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        pass
    value = float(text)
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{text!r} is not a finite number")
    return value


def _json_or_text(text: str) -> object:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except ValueError:
        return text


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)
