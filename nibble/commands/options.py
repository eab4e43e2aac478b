"""The options that every command has."""

from typing import Annotated

import typer

from nibble import output
from nibble.connection import DEFAULT_BASE_URL


def _use_json(wanted: bool) -> bool:
    output.use_json(wanted)
    return wanted


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
