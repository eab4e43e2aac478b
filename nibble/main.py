"""The `nibble` program: the client's commands, and where the server's packages are installed, the server's.

`up`, `demo`, `keys`, `doctor`, `dump` and `restore` belong to `operations`; it is imported when one of them runs, so that the client needs none of it.
"""

import importlib
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer

from nibble.commands import cluster, files, jobs, models
from nibble.endings import ExitCode, abandon_stdout, guarded, refused
from nibble.usage import Program

app = typer.Typer(
    cls=Program,
    help="Fine-tune models on your own machines.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(files.app, name="files")
app.add_typer(jobs.app, name="jobs")
app.add_typer(models.app, name="models")
app.command("queue")(cluster.show_queue)
app.command("workers")(cluster.show_workers)


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nibble {version('nibble')}")
        raise typer.Exit


@app.callback()
def program(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_tell_version, is_eager=True, help="Say the version and leave."
        ),
    ] = False,
) -> None:
    """Fine-tune models on your own machines."""


_PASSED_ON: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "add_help_option": False,
    "rich_help_panel": "On the machine of the service",
}


@app.command(**_PASSED_ON)
@guarded
def up(context: typer.Context) -> None:
    """Start the service here: database, broker, API and a worker."""
    _operations("up", context.args)


@app.command(**_PASSED_ON)
@guarded
def demo(context: typer.Context) -> None:
    """Fine-tune a small model from beginning to end, here and now."""
    _operations("demo", context.args)


@app.command(**_PASSED_ON)
@guarded
def keys(context: typer.Context) -> None:
    """Make API keys (`nibble keys create NAME`)."""
    _operations("keys", context.args)


@app.command(**_PASSED_ON)
@guarded
def doctor(context: typer.Context) -> None:
    """Examine the service: servers, schema, GPUs, disk, clock, queue."""
    _operations("doctor", context.args)


@app.command(**_PASSED_ON)
@guarded
def dump(context: typer.Context) -> None:
    """Save the database and all blobs (`nibble dump FOLDER`)."""
    _operations("dump", context.args)


@app.command(**_PASSED_ON)
@guarded
def restore(context: typer.Context) -> None:
    """Put a dump into a new data folder (`nibble restore FOLDER`)."""
    _operations("restore", context.args)


def _operations(command: str, arguments: list[str]) -> None:
    """Run `python -m operations COMMAND …` in this process."""
    try:
        operations = importlib.import_module("operations.__main__")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("api", "worker", "service"):
            raise
        raise refused(
            f"`nibble {command}` runs on the service's machine and needs its packages ({error.name} is missing): "
            "pip install 'nibble[server,engine]'"
        ) from None
    raise typer.Exit(operations.main([command, *arguments]) or int(ExitCode.SUCCEEDED))


def main() -> None:
    """Run the program; the entry point of `nibble` and `python -m nibble`."""
    try:
        app()
        sys.stdout.flush()
    except KeyboardInterrupt:  # before a command began; afterwards `guarded` has it
        sys.exit(int(ExitCode.INTERRUPTED))
    except OSError as error:  # stdout is gone or full
        abandon_stdout()
        sys.exit(f"Error: cannot write the output: {error.strerror}")
