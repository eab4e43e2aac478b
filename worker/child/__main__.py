"""`python -m worker.child train|validate --parent PID`: started by `worker.spawn`, never by hand.

It gets ready first (a training child imports torch and transformers, but touches no GPU), then waits for the path
of an attempt's folder on its standard input. No path: it was not needed.
"""

import argparse
import ctypes
import importlib
import os
import signal
import sys
from pathlib import Path

from worker.child.failures import explain
from worker.child.report import Report
from worker.folder import AttemptFolder, write_json
from worker.reasons import DISK_FULL_STATUS, is_disk_full

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Get ready, wait, run; the exit status is 0 whenever result.json was written."""
    parser = argparse.ArgumentParser(prog="worker.child")
    parser.add_argument("kind", choices=["train", "validate"])
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    _die_with(arguments.parent)
    # Imported now, while nobody waits: for training this is what takes a child seconds to start.
    module = importlib.import_module(f"worker.child.{arguments.kind}")
    path = sys.stdin.readline().strip()
    if not path:
        return 0
    folder = AttemptFolder(Path(path))
    _write_to(folder.log)
    try:
        report = Report(folder.events)
        try:
            result = module.run(folder, folder.read_spec(), report)
        except Exception as error:  # noqa: BLE001  (the process's edge: it becomes a stored failure)
            result = {"outcome": "failed", "error": explain(error)}
        write_json(folder.result, result)
    except OSError as error:
        if is_disk_full(error):
            return DISK_FULL_STATUS
        raise
    return 0


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends, however that happens."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call: no signal will come
        os._exit(1)


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
