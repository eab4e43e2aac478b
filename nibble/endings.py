"""How a command ends: its exit code and one sentence that says what to do.

Scripts branch on the code, so its numbers are a promise. No traceback ever reaches a user: `guarded` is the
process edge where anything unforeseen becomes a sentence too.
"""

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import Any, NoReturn, ParamSpec, TypeVar

import typer

P = ParamSpec("P")
R = TypeVar("R")


class ExitCode(IntEnum):
    """What a script can learn from `$?`."""

    SUCCEEDED = 0
    FAILED = 1
    """The job failed, or its adapter could not be fetched whole."""
    REFUSED = 2
    """Bad arguments, or the service answered 4xx: the same call will be refused again."""
    CANCELLED = 3
    UNREACHABLE = 4
    """No service there, or it cannot serve just now: the same call may succeed later."""
    INTERRUPTED = 130
    """Ctrl-C (143 for SIGTERM). A job that was created goes on."""


class Ending(Exception):
    """A command ends here, with `code`, saying `message`.

    `error` is what `--json` prints under "error": the service's own envelope where it gave one.
    """

    def __init__(
        self, code: ExitCode, message: str, *, error: dict[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.error = error or {"message": message, "type": code.name.lower()}


class Terminated(KeyboardInterrupt):
    """SIGTERM came, as CI systems send it. Handled like Ctrl-C, told apart by its exit code."""


def refused(message: str) -> Ending:
    """The user's input is at fault; nothing was sent, or the service would not have it."""
    return Ending(ExitCode.REFUSED, message)


def exit_with(ending: Ending) -> NoReturn:
    """Say the ending's sentence on stderr (and as JSON on stdout where asked for) and leave."""
    from nibble import output

    output.say(f"Error: {ending.message}", style="red")
    if output.wants_json():
        output.print_json({"error": ending.error | {"exit_code": int(ending.code)}})
    raise typer.Exit(int(ending.code))


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Let a command end only in the ways that `ExitCode` lists."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with _sigterm_like_ctrl_c():
                return command(*args, **kwargs)
        except Ending as ending:
            exit_with(ending)
        except BrokenPipeError:
            abandon_stdout()  # our reader (`| head`) has left; there is nobody to tell
            raise typer.Exit(int(ExitCode.FAILED)) from None
        except KeyboardInterrupt as interrupt:
            raise typer.Exit(exit_code_of(interrupt)) from None
        except typer.Exit:
            raise
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            exit_with(Ending(ExitCode.FAILED, f"{error.strerror or error}{where}"))
        except Exception as error:  # noqa: BLE001  (the process edge)
            exit_with(_unforeseen(error))

    return run


def abandon_stdout() -> None:
    """Keep the interpreter from flushing what is left into a stdout that takes no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exit_code_of(interrupt: KeyboardInterrupt) -> int:
    """130 for Ctrl-C, 143 for SIGTERM, as shells expect."""
    return 143 if isinstance(interrupt, Terminated) else int(ExitCode.INTERRUPTED)


@contextmanager
def _sigterm_like_ctrl_c() -> Generator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise Terminated


def _unforeseen(error: Exception) -> Ending:
    from nibble.failures import ending_of

    known = ending_of(error)
    if known is not None:
        return known
    kind = f"{type(error).__name__}: {error}".splitlines()[0]
    return Ending(
        ExitCode.FAILED, f"Something unforeseen happened ({kind}); please report it as a bug."
    )
