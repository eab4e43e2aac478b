"""What a process of `TokenizerProcesses` runs: it reads the parts of a file that it is asked for, until its pipe closes."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

from qlora_core.text.encoder import TextEncoder
from qlora_core.text.processes import say_out_of_memory, send
from qlora_core.text.scanning import ScanSettings, scan_part


def main() -> None:
    """Answer on standard output what standard input asks."""
    # What libraries print goes to the log, and not among the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    task = json.loads(sys.stdin.buffer.readline())
    if task["memory_bytes"] is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (task["memory_bytes"], hard))
    settings = ScanSettings(**task["settings"])
    try:
        encoder = TextEncoder.from_folder(task["folder"], now=task["now"])
        with Path(task["path"]).open("rb") as file:
            for line in sys.stdin.buffer:
                asked = json.loads(line)
                send(scan_part(file, encoder=encoder, settings=settings, **asked), answers)
    except MemoryError:
        say_out_of_memory(answers)
    except BrokenPipeError:
        sys.exit()  # the parent is gone, or has seen enough
