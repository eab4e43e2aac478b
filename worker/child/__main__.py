"""`python -m worker.child train|validate --parent PID`: started by `worker.spawn`, never by hand.

It ties itself to its parent, gets ready (a training child imports torch and transformers, but touches no GPU), then
waits for the path of an attempt's folder on its standard input. No path: it was not needed.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from worker.child.tied import die_with
from worker.folder import AttemptFolder, write_json
from worker.reasons import DISK_FULL_STATUS, is_disk_full


def main() -> int:
    """Get ready, wait, run; the exit status is 0 whenever result.json was written."""
    parser = argparse.ArgumentParser(prog="worker.child")
    parser.add_argument("kind", choices=["train", "validate"])
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    die_with(arguments.parent)
    # Imported now, while nobody waits: this is what takes a child seconds to start.
    module = importlib.import_module(f"worker.child.{arguments.kind}")
    path = sys.stdin.readline().strip()
    if not path:
        return 0
    folder = AttemptFolder(Path(path))
    _write_to(folder.log)
    try:
        write_json(folder.result, _run(module, folder))
    except OSError as error:
        if is_disk_full(error):
            return DISK_FULL_STATUS
        raise
    return 0


def _run(module: ModuleType, folder: AttemptFolder) -> dict[str, object]:
    """Run the attempt and return what result.json will hold, whatever happens."""
    from worker.child.failures import explain
    from worker.child.report import Report
    from worker.child.wording import public_words

    say: Callable[[str], str] = str
    try:
        spec = folder.read_spec()
        say = public_words(folder, spec)
        with Report(folder.events, say) as report:
            return module.run(folder, spec, report)
    except Exception as error:  # noqa: BLE001  (the process's edge: it becomes a stored failure)
        reason = explain(error)
        return {"outcome": "failed", "error": reason | {"message": say(reason["message"])}}


def _write_to(log: Path) -> None:
    """Send everything written to stdout and stderr, by Python or by a library, to the attempt's log."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
