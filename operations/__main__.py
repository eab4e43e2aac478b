"""`python -m operations COMMAND`: what `nibble up`, `nibble demo`, `nibble keys`, `nibble doctor`, `nibble dump` and `nibble restore` run."""

import sys
from collections.abc import Sequence

import typer

from nibble.usage import Program
from operations import keys
from operations.backup.command import dump, restore
from operations.demo.run import demo
from operations.doctor.command import doctor
from operations.up import up

app = typer.Typer(
    cls=Program,
    help="Run Nibble on this machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(up)
app.command()(demo)
app.command()(doctor)
app.command()(dump)
app.command()(restore)
app.add_typer(keys.app, name="keys")


def main(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code."""
    try:
        app(list(arguments), prog_name="nibble")
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
