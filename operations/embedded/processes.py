"""Child processes that never outlive the launcher, however it ends.

The kernel sends the death signal when the *thread* that started the child ends, not the process: start children from
a thread that lives as long as they should.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

_TIED = Path(__file__).with_name("tied.py")
_TAIL_BYTES = 4_000


class EmbeddedError(RuntimeError):
    """A server of our own could not start or stop; the message says why and what to do."""


class DataFolderBusy(EmbeddedError):
    """Another process already serves this data folder."""


def start_tied(
    command: Sequence[str | Path],
    *,
    log: Path,
    death_signal: signal.Signals = signal.SIGKILL,
    identity: str = "self",
    env: Mapping[str, str] | None = None,
    keep_open: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `command` in a session of its own; `death_signal` reaches it when the calling thread ends.

    Args:
        command: an absolute program path and its arguments. No secrets: other users can read them.
        log: standard output and error are appended here; made 0600, with its folder.
        death_signal: what the kernel sends when this thread is gone.
        identity: `self`, `namespace` or a user's name, see `tied.py`.
        env: the whole environment; None is this process's own.
        keep_open: file descriptors the child inherits, for instance a lock it must hold.
    """
    arguments = [
        sys.executable,
        "-I",
        "-S",
        str(_TIED),
        str(os.getpid()),
        str(int(death_signal)),
        identity,
        *map(str, command),
    ]
    with open_log(log) as output:
        return subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(env) if env is not None else None,
            # Ctrl-C in a terminal reaches the launcher alone, which then stops its children in order.
            start_new_session=True,
            pass_fds=keep_open,
        )


def run_tied(
    command: Sequence[str | Path], *, log: Path, identity: str = "self", timeout_s: float
) -> int:
    """Run `command` to its end and return its exit status; past `timeout_s` it is killed (status -9)."""
    process = start_tied(command, log=log, identity=identity)
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def stop(process: subprocess.Popen[bytes], how: signal.Signals, *, timeout_s: float) -> bool:
    """Ask `process` to end with signal `how`, wait, and kill it past `timeout_s`.

    Returns:
        Whether it ended by itself. A process that has ended already is no error.
    """
    if process.poll() is None:
        process.send_signal(how)
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    return True


def open_log(path: Path) -> BinaryIO:
    """Open a log for appending, readable by its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "wb")


def tail(path: Path, *, lines: int = 12) -> str:
    """Return the last lines of a log, or an empty string where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def take_lock(path: Path, busy: str, *, patience_s: float = 0.0) -> int:
    """Take the exclusive lock on file `path` and return its descriptor, which holds it until closed.

    Children that inherit the descriptor hold the lock too, so it also tells of one that outlived its parent;
    `patience_s` lets such orphans leave.

    Raises:
        DataFolderBusy: somebody holds it; the message is `busy` and the process id they left in the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    until = time.monotonic() + patience_s
    while not _locked(descriptor):
        if time.monotonic() < until:
            time.sleep(0.05)
            continue
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise DataFolderBusy(f"{busy} ({holder})" if holder else busy)
    note_holder(descriptor, f"process {os.getpid()}")
    return descriptor


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def note_holder(descriptor: int, text: str) -> None:
    """Write into a lock's file who holds it, for the message of `DataFolderBusy`."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)
