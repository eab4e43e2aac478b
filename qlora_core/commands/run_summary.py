"""What a run prints on stdout at its end: a table of figures, and the answers to the sample questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_core.commands.history import History, read_history
from qlora_core.commands.lasting_console import LastingConsole
from qlora_core.commands.printable import printable
from qlora_core.units import duration, size

if TYPE_CHECKING:
    from qlora_core.commands.run_folder import RunFolder
    from qlora_core.train import TrainResult


def print_summary(folder: RunFolder, result: TrainResult, picture: Path | None) -> None:
    """Print what came of a finished run."""
    history = read_history(folder.events())
    console = LastingConsole()
    # Not as the table's title, which would be broken at the table's width.
    console.print(Text(str(folder.path), "italic"), soft_wrap=True)
    console.print(_table(result, history, picture))
    asked = zip(history.samples.get("base", ()), history.samples.get("adapter", ()), strict=False)
    for base, adapter in asked:
        console.print()
        _print_answers(console, base, adapter)


def _table(result: TrainResult, history: History, picture: Path | None) -> Table:
    table = Table(show_header=False)
    early = ", stopped early" if result.stopped_early else ""
    table.add_row("steps", f"{result.steps:,}{early}")
    table.add_row("trained tokens", f"{result.trained_tokens:,}")
    first = next(iter(sorted(history.train.items())), None)
    if first is not None:
        table.add_row(
            "training loss",
            f"{first[1]:.4f} in step {first[0]}, {result.train_loss:.4f} in the last epoch",
        )
    table.add_row(*_validation_row(result, history))
    seconds = sum(history.seconds.values())
    speed = sum(history.tokens.values()) / seconds if seconds else 0.0
    table.add_row("time in steps", f"{duration(seconds)}, {speed:,.0f} tokens/s")
    table.add_row("peak memory", size(history.peak_bytes))
    last = result.adapter_step == result.steps
    table.add_row(
        "adapter", "adapter" if last else f"adapter, the best one, of step {result.adapter_step:,}"
    )
    table.add_row("loss curve", "not drawn" if picture is None else picture.name)
    return table


def _validation_row(result: TrainResult, history: History) -> tuple[str, str]:
    if result.valid_loss is None:
        return "validation loss", "not measured"
    base = history.validation.get(0)
    before = "" if base is None else f"{base:.4f} of the base model, "
    return "validation loss", f"{before}{result.valid_loss:.4f} of the adapter"


def _print_answers(console: Console, base: Mapping[str, Any], adapter: Mapping[str, Any]) -> None:
    messages: Sequence[Mapping[str, Any]] = base["messages"]
    for name, text in (
        ("question", str(messages[-1]["content"])),
        ("base", base["answer"]),
        ("adapter", adapter["answer"]),
    ):
        console.print(Text(f"{name:<9} {' '.join(printable(text).split())}"), soft_wrap=True)
