"""Child processes: started by a thread that lives as long as the worker, signalled and ended as a group.

Each is its own session and process group, dies with the thread that started it (it sets PDEATHSIG itself), and
gets its work, the path of an attempt's folder, over its standard input. None of our own settings reach it: it has no
business with the database.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from service.queue.broker import Kind

_CLOSE_S = 2.0
_STDERR = 2


class Child:
    """One child process, serving at most one attempt."""

    def __init__(
        self, kind: Kind, *, environment: Mapping[str, str], inherit: Sequence[int]
    ) -> None:
        """Start it. `inherit`: descriptors it holds on to; `environment`: variables beside the worker's own."""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "worker.child", kind, "--parent", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=_STDERR,  # until it has a folder, what it says belongs to the worker's log
            stderr=_STDERR,
            start_new_session=True,
            pass_fds=tuple(inherit),
            env=child_environment() | dict(environment),
            cwd="/",
        )

    @property
    def pid(self) -> int:
        """Its process id, which is its group's too."""
        return self._process.pid

    def begin(self, folder: Path) -> None:
        """Tell it which attempt to run. A child that has died meanwhile shows in `has_exited`."""
        pipe = self._process.stdin
        if pipe is None:
            raise RuntimeError("this child has its work already")
        with contextlib.suppress(BrokenPipeError):
            pipe.write(f"{folder}\n".encode())
            pipe.flush()
        with contextlib.suppress(BrokenPipeError):
            pipe.close()

    def has_exited(self) -> bool:
        """Tell whether it has ended; it is not reaped yet, so its group cannot become somebody else's."""
        if self._process.returncode is not None:
            return True
        status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return status is not None

    def signal(self, number: signal.Signals) -> None:
        """Signal its whole group."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def end(self) -> int:
        """Kill whatever is left of its group, reap it, and return the exit status (negative: a signal's number)."""
        self.signal(signal.SIGKILL)
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        return self._process.wait()

    def dismiss(self) -> None:
        """Let a spare one go that was never given work."""
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        deadline = time.monotonic() + _CLOSE_S
        while not self.has_exited() and time.monotonic() < deadline:
            time.sleep(0.02)
        self.end()


def child_environment() -> dict[str, str]:
    """The worker's environment without our own settings, some of which are secret."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("NIBBLE_")}  # noqa: TID251
    inherited["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    inherited["PYTHONUNBUFFERED"] = "1"
    inherited["TOKENIZERS_PARALLELISM"] = "false"
    # torch's threads spin while they wait for one another; on shared cores that costs ten times the work.
    inherited.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return inherited
