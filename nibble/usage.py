"""Wrong arguments, told as every other error is: with --json also as a document on stdout.

typer refuses them before a command, and so its --json, is reached.
"""

from typing import Any

from typer.core import TyperGroup
from typer.exceptions import TyperException

from nibble import output
from nibble.endings import ExitCode


class Program(TyperGroup):
    """The commands of a program."""

    _json = False

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - typer's own, private
        """Note whether --json is anywhere among the arguments: the one that is wrong may stand before it."""
        self._json = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401
        """Run the command that the arguments name."""
        try:
            return super().invoke(ctx)
        except TyperException as error:
            if self._json:
                # Only UsageError, which is private, has a sentence that names the option.
                format_message = getattr(error, "format_message", error.__str__)
                document = {"message": format_message(), "type": ExitCode.REFUSED.name.lower()}
                output.print_json({"error": document | {"exit_code": int(ExitCode.REFUSED)}})
            raise
