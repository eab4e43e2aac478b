"""A job's events as the service serves them, read into what is shown of them.

Nothing about their form is trusted: what is missing or of another type is None, and a line that is no event is dropped.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast


@dataclass(frozen=True)
class Step:
    """A step's figures; None where the event does not say. `memory_bytes` is the peak on a GPU, RSS on a CPU."""

    number: int | None
    total: int | None
    train_loss: float | None
    valid_loss: float | None
    tokens_per_s: float | None
    memory_bytes: float | None


@dataclass(frozen=True)
class Sample:
    """What the model said to one of the job's sample prompts; `question` is the prompt's last message."""

    question: str
    answer: str


@dataclass(frozen=True)
class JobEvent:
    """One event; `step` is there when it is of type `metrics`, `samples` when it brings any."""

    id: str
    level: str
    message: str
    step: Step | None
    samples: tuple[Sample, ...] = ()


def read_event(document: object) -> JobEvent | None:
    """An event out of its JSON, or None for anything else."""
    if not isinstance(document, dict):
        return None
    event = cast("dict[str, Any]", document)
    if not isinstance(event.get("message"), str):
        return None
    data = _mapping(event.get("data"))
    return JobEvent(
        id=str(event.get("id") or ""),
        level=str(event.get("level") or "info"),
        message=event["message"],
        step=_step(data) if event.get("type") == "metrics" else None,
        samples=tuple(_samples(data)) if data.get("kind") == "samples_generated" else (),
    )


def _step(data: dict[str, Any]) -> Step:
    memory = _mapping(data.get("memory"))
    return Step(
        number=_whole(data.get("step")),
        total=_whole(data.get("total_steps")),
        train_loss=_number(data.get("train_loss")),
        valid_loss=_first(data.get("full_valid_loss"), data.get("valid_loss")),
        tokens_per_s=_number(data.get("tokens_per_s")),
        memory_bytes=_first(memory.get("peak_bytes"), memory.get("rss_bytes")),
    )


def _samples(data: dict[str, Any]) -> Iterator[Sample]:
    for sample in map(_mapping, _list(data.get("samples"))):
        messages = _list(sample.get("messages"))
        question = _mapping(messages[-1]).get("content") if messages else None
        if isinstance(question, str) and isinstance(sample.get("answer"), str):
            yield Sample(question, sample["answer"])


def _list(value: object) -> list[object]:
    return cast("list[object]", value) if isinstance(value, list) else []


def _mapping(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(cast("float", value)) if usable else None


def _whole(value: object) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


def _first(*values: object) -> float | None:
    return next((number for number in map(_number, values) if number is not None), None)
