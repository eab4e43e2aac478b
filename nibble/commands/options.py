"""The options and arguments that several commands have."""

from typing import Annotated

import typer

from nibble import output
from nibble.connection import DEFAULT_BASE_URL


def _use_json(wanted: bool) -> bool:
    output.use_json(wanted)
    return wanted


def an_id(text: str) -> str:
    """An id as it was given; an empty one (a shell variable that was never set) is refused here."""
    if not text.strip():
        raise typer.BadParameter("an id cannot be empty.")
    return text


JobId = Annotated[str, typer.Argument(metavar="JOB-ID", parser=an_id)]
BaseUrl = Annotated[
    str | None,
    typer.Option(
        "--base-url",
        help="The service's address; else NIBBLE_BASE_URL, OPENAI_BASE_URL, "
        f"{DEFAULT_BASE_URL}. The key comes from NIBBLE_API_KEY or OPENAI_API_KEY.",
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", callback=_use_json, help="Print one JSON document on stdout."),
]
Patience = Annotated[
    float,
    typer.Option(
        "--timeout",
        min=0,
        help="Give up when the service cannot be reached for so many seconds.",
    ),
]
