"""events.jsonl: what the child tells, one JSON object per line, flushed at once."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from service.events.actions import Level
from service.events.content import storable, storable_text


class EngineEvent(Protocol):
    """What the engine's events have in common; this module must load without the engine's training half."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and `kind`."""
        ...


class Report:
    """The lines of one attempt, numbered from 1."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._n = 0

    def message(
        self, text: str, *, level: Level = "info", data: dict[str, Any] | None = None
    ) -> None:
        """Tell something in words."""
        self._write("message", level, text, data)

    def metrics(self, text: str, data: dict[str, Any]) -> None:
        """Tell figures of a step."""
        self._write("metrics", "info", text, data)

    def _write(self, type_: str, level: Level, text: str, data: dict[str, Any] | None) -> None:
        self._n += 1
        line = {
            "n": self._n,
            "at": time.time(),
            "level": level,
            "type": type_,
            "message": storable_text(text),
            "data": storable(data) or {},
        }
        # One write per line: the reader never takes half of one for the whole.
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()


def sink(report: Report) -> Callable[[EngineEvent], None]:
    """Return what turns the engine's events into lines, in OpenAI's words where it has any."""

    def tell(event: EngineEvent) -> None:
        data = event.as_dict()
        match data["kind"]:
            case "step_metrics":
                report.metrics(step_message(data), data)
            case "validation_metrics":
                report.metrics(
                    _validation_message(data), data | {"valid_loss": data["full_valid_loss"]}
                )
            case "notice":
                report.message(data["message"], level=data["level"], data=data["data"])
            case kind:
                report.message(_MESSAGES.get(kind, kind).format_map(data), data=data)

    return tell


_MESSAGES = {
    "run_started": "Training on {n_examples} examples for {n_epochs} epochs: {total_steps} steps on {device}",
    "checkpoint_saved": "Checkpoint saved at step {step}",
    "resume_point_saved": "Resume point saved at step {step}",
    "samples_generated": "Samples generated at step {step} by the {stage}",
    "run_finished": "Training finished after {steps} steps: training loss={train_loss:.4f}",
}


def step_message(data: dict[str, Any]) -> str:
    """Return OpenAI's line for a step."""
    return f"Step {data['step']}/{data['total_steps']}: training loss={data['train_loss']:.2f}"


def _validation_message(data: dict[str, Any]) -> str:
    return f"Step {data['step']}: full validation loss={data['full_valid_loss']:.2f}"
