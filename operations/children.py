"""The API and the worker as children of the launcher, and starting again what ends by itself."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from operations.embedded import processes

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_HEALTHY_S = 60.0
"""A child that lived so long is started again without having to wait for its earlier failures."""


class Running(Protocol):
    """A started process: an embedded server, or a `Program`."""

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process itself."""
        ...

    @property
    def log(self) -> Path:
        """Where its output goes."""
        ...

    def stop(self) -> None:
        """End it and give back what it holds; safe to call twice."""
        ...


@dataclass
class Program:
    """A module of ours running as a process: `python -m MODULE`."""

    process: subprocess.Popen[bytes]
    log: Path
    grace_s: float

    def stop(self) -> None:
        """Ask it to end, and kill it when it has not within its grace."""
        processes.stop(self.process, signal.SIGTERM, timeout_s=self.grace_s)


def start_program(module: str, *, env: Mapping[str, str], log: Path, grace_s: float) -> Program:
    """Start `python -m module`, which dies with this thread. Secrets belong into `env`."""
    process = processes.start_tied([sys.executable, "-m", module], log=log, env=env)
    return Program(process=process, log=log, grace_s=grace_s)


@dataclass
class Kept:
    """A process that is started again when it ends by itself, after pauses of 1, 2, 4 … 30 seconds.

    Everything here is called from one thread, since that thread's end would end the process.
    """

    name: str
    start: Callable[[], Running]
    say: Callable[[str], None]
    running: Running = field(init=False)
    _started_at: float = field(init=False)
    _again_at: float | None = field(init=False, default=None)
    _pause_s: float = field(init=False, default=_FIRST_PAUSE_S)

    def __post_init__(self) -> None:
        self._start()

    def look_after(self) -> None:
        """Notice that the process has ended and say so; start it again when its pause is over."""
        now = time.monotonic()
        if self._again_at is not None:
            if now >= self._again_at:
                self._again_at = None
                self._try_again()
        elif self.running.process.poll() is not None:
            if now - self._started_at > _HEALTHY_S:
                self._pause_s = _FIRST_PAUSE_S
            status = _told(self.running.process.returncode)
            self._plan_again(f"{self.name} ended ({status})")

    def ended(self) -> bool:
        """Whether the process is not there just now."""
        return self.running.process.poll() is not None

    def stop(self) -> None:
        """End it for good."""
        self.running.stop()

    def _start(self) -> None:
        self._started_at = time.monotonic()
        self.running = self.start()

    def _try_again(self) -> None:
        self.running.stop()  # gives back what the ended one held: locks
        try:
            self._start()
        except processes.EmbeddedError as error:
            self._plan_again(str(error))
        else:
            self.say(f"{self.name} runs again.")

    def _plan_again(self, why: str) -> None:
        self.say(
            f"{why}; its log is {self.running.log}. Starting it again in {self._pause_s:.0f} s."
        )
        self._again_at = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)


def _told(status: int) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"
