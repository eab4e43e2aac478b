"""What a run's events amount to, over all times it was resumed: curves for the plot, figures for the summary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class History:
    """The run as it counts: what was done again after a kill is there once.

    Attributes:
        train: loss by step; a skipped step has none.
        validation: loss by step; that of step 0 is the base model's.
        seconds: spent in the steps that count.
        tokens: seen in these.
        peak_bytes: of memory, the highest told.
        samples: the answers to the sample questions, by who gave them: "base" or "adapter".
    """

    train: dict[int, float] = field(default_factory=dict[int, float])
    validation: dict[int, float] = field(default_factory=dict[int, float])
    seconds: dict[int, float] = field(default_factory=dict[int, float])
    tokens: dict[int, float] = field(default_factory=dict[int, float])
    peak_bytes: int = 0
    samples: dict[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


def read_history(events: Iterable[Mapping[str, Any]]) -> History:
    """Gather a run's events."""
    history = History()
    for event in events:
        match event.get("kind"):
            case "run_started":
                _go_back(history, event["start_step"])
            case "step_metrics":
                _add_step(history, event)
            case "validation_metrics":
                history.validation[event["step"]] = event["full_valid_loss"]
            case "samples_generated":
                history.samples[event["stage"]] = event["samples"]
            case _:
                pass
    return history


def peak_memory(memory: Mapping[str, int]) -> int:
    """Give the peak among a step's kinds of memory, of the GPU or of the process."""
    return memory.get("peak_bytes", memory.get("peak_rss_bytes", 0))


def _add_step(history: History, event: Mapping[str, Any]) -> None:
    step = event["step"]
    if event["train_loss"] is not None:
        history.train[step] = event["train_loss"]
    history.seconds[step] = event["step_time_s"]
    history.tokens[step] = event["tokens_per_s"] * event["step_time_s"]
    history.peak_bytes = max(history.peak_bytes, peak_memory(event["memory"]))


def _go_back(history: History, step: int) -> None:
    """Forget what came after the step that the run goes on from."""
    for figures in (history.train, history.validation, history.seconds, history.tokens):
        for later in [one for one in figures if one > step]:
            del figures[later]
