"""A job's progress on stderr: a bar with its last figures on a terminal, plain lines elsewhere (CI logs)."""

import textwrap
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column
from rich.text import Text

from nibble import output
from nibble.events import JobEvent, Step

LINE_EVERY_S = 5.0
"""Plain lines tell of a step at most so often; validations, the first and the last step always."""
SAMPLE_CHARACTERS = 300
"""So much is shown of a sample's question and of its answer."""

_BAR_WIDTH = 24
_TIME_WIDTH = 8
_STYLES = {"warn": "yellow", "error": "red"}


@contextmanager
def transfer(description: str) -> Generator[Callable[[int, int | None], None]]:
    """A bar for bytes on their way, where there is a terminal; call what it gives with (done, total) in bytes."""
    if not output.people().is_terminal:
        yield lambda _done, _total: None
        return
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=_BAR_WIDTH),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        console=output.people(),
    )
    with bar:
        task = bar.add_task(output.plain(description), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class Display(Protocol):
    """What a follower reports to, used as a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...

    def event(self, event: JobEvent) -> None:
        """Show an event of the job."""
        ...

    def trouble(self, message: str) -> None:
        """Show that the connection is lost."""
        ...


def display() -> Display:
    """The one that fits this process's stderr."""
    return BarDisplay() if output.people().is_terminal else LineDisplay()


def figures(step: Step) -> list[str]:
    """A step's figures for people, those that it has: losses, speed, memory."""
    shown: list[str] = []
    if step.train_loss is not None:
        shown.append(f"loss {step.train_loss:.4f}")
    if step.valid_loss is not None:
        shown.append(f"validation loss {step.valid_loss:.4f}")
    if step.tokens_per_s is not None:
        shown.append(f"{step.tokens_per_s:,.0f} tokens/s")
    if step.memory_bytes is not None:
        shown.append(f"memory {output.size(step.memory_bytes)}")
    return shown


def message(event: JobEvent) -> str:
    """An event's message, and below it each sample's question and answer."""
    told = [event.message]
    for sample in event.samples:
        told += [f"  Q: {_one_line(sample.question)}", f"  A: {_one_line(sample.answer)}"]
    return "\n".join(told)


class LineDisplay:
    """One line per message, and per step as `LINE_EVERY_S` allows."""

    def __init__(self) -> None:
        self._told_at = float("-inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def event(self, event: JobEvent) -> None:
        """Print the event, unless it is a step too soon after another."""
        step = event.step
        if step is None:
            output.say(message(event), style=_STYLES.get(event.level, ""))
            return
        now = time.monotonic()
        due = now - self._told_at >= LINE_EVERY_S or step.number == step.total
        if step.train_loss is not None and due:
            self._told_at = now
        if due or step.valid_loss is not None:
            output.say(
                f"Step {_count(step.number)}/{_count(step.total)}: {', '.join(figures(step))}"
            )

    def trouble(self, message: str) -> None:
        """Print it."""
        output.say(message, style="yellow")


class _Figures(ProgressColumn):
    """As many of the last figures as the terminal has room for: a bar of several lines cannot be drawn over itself."""

    def __init__(self, console: Console) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._console = console

    def render(self, task: Task) -> Text:
        """Draw those that fit beside the other columns, the first ones first."""
        others = (
            len(task.description) + _BAR_WIDTH + len(f" {task.total}/{task.total} ") + _TIME_WIDTH
        )
        shown = ""
        for figure in task.fields.get("figures", ()):
            longer = f"{shown}  {figure}" if shown else figure
            if others + len(longer) < self._console.width:
                shown = longer
        return Text(shown, style="cyan")


class BarDisplay:
    """A bar that stays below the messages."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=_BAR_WIDTH),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            _Figures(output.people()),
            TimeRemainingColumn(compact=True),
            console=output.people(),
        )
        self._task = self._bar.add_task("training", total=1, visible=False, figures=())
        self._latest: list[str] = []
        self._validation: list[str] = []

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def event(self, event: JobEvent) -> None:
        """Move the bar by a step's figures; print any other message above it."""
        step = event.step
        if step is None:
            text = Text(output.plain(message(event)), style=_STYLES.get(event.level, ""))
            self._bar.console.print(text)
            return
        told = figures(step)
        validation = [figure for figure in told if figure.startswith("validation")]
        latest = [figure for figure in told if not figure.startswith("validation")]
        # Validations come in events of their own: each kind of figure stays until its next one.
        self._validation = validation or self._validation
        self._latest = latest or self._latest
        if step.number is not None and step.total is not None:
            self._bar.update(
                self._task,
                completed=step.number,
                total=max(step.total, 1),
                figures=self._latest[:1] + self._validation + self._latest[1:],
                visible=True,
            )

    def trouble(self, message: str) -> None:
        """Print it above the bar."""
        self._bar.console.print(Text(message, style="yellow"))


def _one_line(text: str) -> str:
    """The beginning of a text, on one line; the whole of it is in the event."""
    return textwrap.shorten(text, SAMPLE_CHARACTERS, placeholder=" …")


def _count(number: int | None) -> str:
    return "?" if number is None else str(number)
