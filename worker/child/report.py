"""events.jsonl: what the child tells, one JSON object per line, flushed at once."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

from service.events.actions import Level
from service.events.content import storable, storable_text


class EngineEvent(Protocol):
    """What the engine's events have in common; this module must load without the engine's training half."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and `kind`."""
        ...


class Report:
    """The lines of one attempt, numbered from 1."""

    def __init__(self, path: Path, say: Callable[[str], str] = str) -> None:
        """`say` makes a message fit for users."""
        self._say = say
        self._file = path.open("a", encoding="utf-8")
        self._n = 0

    def __enter__(self) -> Self:
        """Use it in a `with`, which closes the file."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file; every line is in it already."""
        self._file.close()

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
            "message": storable_text(self._say(text)),
            "data": storable(data) or {},
        }
        # One write per line: the reader never takes half of one for the whole.
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()


def sink(report: Report) -> Callable[[EngineEvent], None]:
    """Return what turns the engine's events into lines, in OpenAI's words where it has any."""
    total_steps = 0

    def tell(event: EngineEvent) -> None:
        nonlocal total_steps
        data = _in_the_jobs_words(event.as_dict())
        match data["kind"]:
            case "run_started":
                total_steps = data["total_steps"]
                report.message(_MESSAGES["run_started"].format_map(data), data=data)
                _tell_resumed(report, data["start_step"])
            case "step_metrics":
                report.metrics(step_message(data), data)
            case "validation_metrics":
                data["total_steps"] = total_steps
                report.metrics(_validation_message(data), data | _also_as_valid(data))
            case "notice":
                report.message(data["message"], level=data["level"], data=data["data"])
            case "resume_not_exact":
                report.message(_not_exact_message(data), level="warn", data=data)
            case "out_of_memory_recovered":
                report.message(data.pop("message"), level="warn", data=data)
            case "run_finished":
                report.message(_finished_message(data), data=data)
            case "dataset_progress":
                share = data["done_bytes"] / data["total_bytes"]
                report.message(
                    f"Reading the files: {share:.0%} of {data['total_bytes']:,} bytes", data=data
                )
            case kind:
                report.message(_MESSAGES.get(str(kind), str(kind)).format_map(data), data=data)

    return tell


_MESSAGES = {
    "run_started": "Training on {n_examples} examples for {n_epochs} epochs: {total_steps} steps on {device}",
    "checkpoint_saved": "Checkpoint saved at step {step}",
    "resume_point_saved": "Resume point saved at step {step}",
    "samples_generated": "Samples generated at step {step} by the {stage}",
}


def _in_the_jobs_words(data: dict[str, Any]) -> dict[str, Any]:
    """Rename what the engine calls trained tokens, those with loss: a job's `trained_tokens` are all, as OpenAI's."""
    return {"loss_tokens" if name == "trained_tokens" else name: data[name] for name in data}


def _tell_resumed(report: Report, start_step: int) -> None:
    """Say from which step an earlier attempt is taken up; the engine alone knows which resume point was whole."""
    if start_step > 0:
        report.message(
            f"Resumed from step {start_step}",
            data={"kind": "attempt_resumed", "from_step": start_step},
        )


def _not_exact_message(data: dict[str, Any]) -> str:
    reasons = " ".join(data["reasons"])
    return f"Goes on after step {data['step']}, but perhaps not to the bit as without a stop. {reasons}"


def _also_as_valid(data: dict[str, Any]) -> dict[str, Any]:
    """OpenAI tells a batch's validation loss beside the whole set's; we always measure the whole set."""
    return {
        "valid_loss": data["full_valid_loss"],
        "valid_mean_token_accuracy": data["full_valid_mean_token_accuracy"],
    }


def step_message(data: dict[str, Any]) -> str:
    """Return OpenAI's line for a step; one that was skipped had no loss that is a number."""
    place = f"Step {data['step']}/{data['total_steps']}"
    if data["train_loss"] is None:
        return f"{place}: skipped"
    return f"{place}: training loss={data['train_loss']:.2f}"


def _finished_message(data: dict[str, Any]) -> str:
    """Say how it ended, and of which step the adapter is where that is not the last."""
    text = f"Training finished after {data['steps']} steps: training loss={data['train_loss']:.4f}"
    if data["adapter_step"] == data["steps"]:
        return text
    loss = data["full_valid_loss"]
    return f"{text}; the adapter is the best one, of step {data['adapter_step']}: full validation loss={loss:.4f}"


def _validation_message(data: dict[str, Any]) -> str:
    return f"Step {data['step']}/{data['total_steps']}: full validation loss={data['full_valid_loss']:.2f}"
