"""A command goes on when nobody reads its messages any more."""

from __future__ import annotations

import os

from qlora_core.commands.lasting_console import LastingConsole


def test_a_pipe_that_nobody_reads_makes_it_silent() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as file:
        console = LastingConsole(stderr=True)
        console.file = file

        console.print("nobody hears")
        console.print("this either")
        print("nor this", file=file, flush=True)

    assert console.quiet
