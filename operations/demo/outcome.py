"""What a finished job's events say of it: losses at the start and at the end, answers before and after."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, cast

_AVERAGED_STEPS = 10
"""A single step's training loss says little of a small batch; the ends are means over so many steps."""


@dataclass(frozen=True)
class Answer:
    """One question, as the base model and as the adapter answer it."""

    question: str
    base: str
    adapter: str


@dataclass(frozen=True)
class Outcome:
    """The figures of a job; a loss is None where no event tells it."""

    steps: int
    averaged_steps: int
    first_train_loss: float | None
    last_train_loss: float | None
    first_valid_loss: float | None
    last_valid_loss: float | None
    answers: tuple[Answer, ...]

    @property
    def improved(self) -> bool:
        """Whether the validation loss fell between the start and the end."""
        first, last = self.first_valid_loss, self.last_valid_loss
        return first is not None and last is not None and last < first


def read_outcome(events: Iterable[Mapping[str, Any]]) -> Outcome:
    """Read a job's events, oldest first. A step that was trained twice counts as the newest attempt tells it."""
    train: dict[int, float] = {}
    valid: dict[int, float] = {}
    samples: dict[str, list[Mapping[str, Any]]] = {}
    for event in events:
        data = cast("dict[str, Any]", event.get("data") or {})
        step = data.get("step")
        if isinstance(step, int):
            _keep(train, step, data.get("train_loss"))
            _keep(valid, step, data.get("full_valid_loss"))
        if data.get("kind") == "samples_generated":
            samples[str(data.get("stage"))] = data.get("samples") or []
    losses = [train[step] for step in sorted(train)]
    validations = [valid[step] for step in sorted(valid)]
    n = max(1, min(_AVERAGED_STEPS, len(losses) // 4))
    return Outcome(
        steps=max(train, default=0),
        averaged_steps=n,
        first_train_loss=fmean(losses[:n]) if losses else None,
        last_train_loss=fmean(losses[-n:]) if losses else None,
        first_valid_loss=validations[0] if validations else None,
        last_valid_loss=validations[-1] if validations else None,
        answers=_answers(samples.get("base", []), samples.get("adapter", [])),
    )


def _keep(losses: dict[int, float], step: int, loss: object) -> None:
    if isinstance(loss, int | float) and not isinstance(loss, bool):
        losses[step] = float(loss)


def _answers(base: list[Mapping[str, Any]], adapter: list[Mapping[str, Any]]) -> tuple[Answer, ...]:
    return tuple(
        Answer(
            question=_question(before.get("messages")),
            base=str(before.get("answer")),
            adapter=str(after.get("answer")),
        )
        for before, after in zip(base, adapter, strict=False)
    )


def _question(messages: object) -> str:
    conversation = cast("list[dict[str, Any]]", messages) if isinstance(messages, list) else []
    return str(conversation[-1].get("content")) if conversation else ""
