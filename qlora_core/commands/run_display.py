"""Shows a run while it trains, on stderr: a bar where that is a terminal, a line now and then where it is not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from qlora_core.commands.history import peak_memory
from qlora_core.train.events import (
    DatasetProgress,
    Event,
    Notice,
    OutOfMemoryRecovered,
    ResumeNotExact,
    RunStarted,
    StepMetrics,
    ValidationMetrics,
)
from qlora_core.units import duration, size

_LINE_EVERY_S = 10.0
# What stands before a notice of a level, and its colour.
_NOTICES = {"info": ("", ""), "warn": ("Warning: ", "yellow"), "error": ("Error: ", "red")}


class RunDisplay:
    """Tells a person what a run's events say; call `tell` with each of them inside `shown`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=6),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=None, visible=False, figures="")
        self._total_steps = 0
        self._line_at = -_LINE_EVERY_S
        self._seconds: list[float] = []

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Draw the bar while the block runs."""
        with self._bar:
            yield

    def say(self, message: str, style: str = "") -> None:
        """Print a line above the bar."""
        self._console.print(Text(message, style), soft_wrap=True)

    def tell(self, event: Event) -> None:
        """Show an event."""
        match event:
            case RunStarted():
                self._start(event)
            case StepMetrics():
                self._step(event)
            case ValidationMetrics():
                self._validation(event)
            case Notice():
                prefix, style = _NOTICES[event.level]
                self.say(prefix + event.message, style)
            case ResumeNotExact():
                self.say(f"{_NOTICES['warn'][0]}{event.message}", _NOTICES["warn"][1])
            case OutOfMemoryRecovered():
                self.say(f"Warning: {event.message}", "yellow")
            case DatasetProgress() if not self._console.is_terminal:
                done, total = (n / 2**20 for n in (event.done_bytes, event.total_bytes))
                self.say(f"tokenized {done:,.0f} of {total:,.0f} MiB")
            case _:
                pass

    def _start(self, event: RunStarted) -> None:
        self._total_steps = event.total_steps
        self.say(
            f"{event.n_examples:,} examples, {event.total_steps:,} steps; {event.trainable_parameters:,} parameters to "
            f"train over a base of {event.base_bytes / 2**20:,.1f} MiB, on {event.device}"
        )
        if event.n_truncated or event.n_dropped:
            self.say(
                f"cut to the context length: {event.n_truncated:,}; left out because nothing in them is trained: "
                f"{event.n_dropped:,}"
            )
        if event.start_step:
            self.say(f"going on after step {event.start_step:,}")
        self._bar.update(
            self._task, total=event.total_steps, completed=event.start_step, visible=True
        )

    def _step(self, event: StepMetrics) -> None:
        figures = _figures(event)
        self._bar.update(self._task, completed=event.step, figures=figures)
        self._seconds = [*self._seconds[-49:], event.step_time_s]
        now = time.monotonic()
        due = now - self._line_at >= _LINE_EVERY_S or event.step == self._total_steps
        if due and not self._console.is_terminal:
            self._line_at = now
            left = sum(self._seconds) / len(self._seconds) * (self._total_steps - event.step)
            self.say(f"step {event.step:,}/{self._total_steps:,} {figures}, {duration(left)} left")

    def _validation(self, event: ValidationMetrics) -> None:
        of = "of the base model" if event.step == 0 else f"after step {event.step:,}"
        best = ", the best so far" if event.is_best else ""
        self.say(
            f"validation {of}: loss {event.full_valid_loss:.4f}, "
            f"accuracy {event.full_valid_mean_token_accuracy:.1%}{best}"
        )


def _figures(event: StepMetrics) -> str:
    loss = "skipped" if event.train_loss is None else f"{event.train_loss:.4f}"
    memory = size(peak_memory(event.memory))
    return f"loss {loss} lr {event.learning_rate:.1e} {event.tokens_per_s:,.0f} tokens/s {memory}"
