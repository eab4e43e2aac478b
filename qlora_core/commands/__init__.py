"""The engine's command line, one file per command; the only part of the engine that needs typer and rich.

A command's file imports torch and the like inside its function, so that `--help` answers at once.
"""

from __future__ import annotations

import typer

from qlora_core.commands.estimate import estimate
from qlora_core.commands.generate import generate
from qlora_core.commands.merge import merge
from qlora_core.commands.quantize import quantize
from qlora_core.commands.train import train

__all__ = ["app", "main"]

app = typer.Typer(
    help="Fine-tune language models with QLoRA.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _several() -> None:
    """Keep typer from taking a program of one command for that command."""


app.command()(train)
app.command()(estimate)
app.command()(generate)
app.command()(merge)
app.command()(quantize)


def main() -> None:
    """Run the program; the entry point of `python -m qlora_core`."""
    app(prog_name="python -m qlora_core")
