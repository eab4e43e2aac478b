"""How a command ends: what the user did wrong is one sentence on stderr, never a traceback."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from qlora_core.errors import EngineError
from qlora_core.out_of_memory import is_out_of_memory

P = ParamSpec("P")
R = TypeVar("R")

REFUSED = 2
"""The exit code of whatever cannot be done with these arguments, or on this machine."""
INTERRUPTED = 130
"""Of Ctrl-C, as shells have it."""

_ENGINE = frozenset({"jinja2", "numpy", "safetensors", "tokenizers", "torch", "transformers"})
"""What a command computes with; installing the command line alone does not bring these."""


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Turn the errors that a command may meet into a sentence and an exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except EngineError as error:
            _end(error.message)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in _ENGINE:
                raise
            _end(f"{error.name} is not installed; pip install 'nibble[engine]' brings it")
        except OSError as error:
            # Of two files the second is the one to be written.
            where = error.filename2 or error.filename or "a file"
            _end(f"{where}: {error.strerror or error}")
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            _end(
                "there is too little memory for that; use a smaller model, or a device with more of it"
            )
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None

    return run


def _end(message: str) -> NoReturn:
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(f"Error: {message}", "red"))
    raise typer.Exit(REFUSED) from None
