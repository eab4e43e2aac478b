"""Where a command that goes on for hours says how it goes: a console that falls silent when nobody reads it any more."""

from __future__ import annotations

import os
from contextlib import suppress

from rich.console import Console


class LastingConsole(Console):
    """Falls silent at a closed pipe (``2>&1 | head``), where rich would end the process.

    Args:
        stderr: whether it writes there, not to stdout.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False)

    def on_broken_pipe(self) -> None:
        """Go on; nothing else that is written there fails either, such as what Python still holds of it at its end."""
        self.quiet = True
        with suppress(OSError), open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - no path of anybody's
            os.dup2(nowhere.fileno(), self.file.fileno())
