"""A launcher in a process of its own, as people start it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

T = TypeVar("T")


def of_each(processes: list[psutil.Process], ask: Callable[[psutil.Process], T]) -> list[T]:
    """Ask processes something; those that have ended meanwhile say nothing."""
    told: list[T] = []
    for process in processes:
        with suppress(psutil.Error):
            told.append(ask(process))
    return told


class Launcher:
    """A running `python -m operations up`; its lines are collected as they come."""

    def __init__(self, arguments: list[str], env: dict[str, str]) -> None:
        self.lines: list[str] = []
        self._news = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "operations", "up", "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | env,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def wait_for(self, pattern: str, *, timeout_s: float = 90) -> re.Match[str]:
        """Return the match of the first line that has `pattern`; fail when it does not come."""

        def found() -> re.Match[str] | None:
            return next((m for line in self.lines if (m := re.search(pattern, line))), None)

        with self._news:
            self._news.wait_for(lambda: found() or not self._reader.is_alive(), timeout_s)
        match = found()
        assert match, f"no {pattern!r} in:\n" + "\n".join(self.lines)
        return match

    def printed(self) -> str:
        """What it wrote on stdout, once it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.read()

    def url(self) -> str:
        """The address it tells, once it is ready."""
        return self.wait_for(r"API +(http://\S+)/v1")[1]

    def get(self, path: str) -> dict[str, object]:
        """The JSON of a GET without a key."""
        with urllib.request.urlopen(self.url() + path, timeout=60) as answer:  # noqa: S310
            return json.load(answer)

    def family(self) -> list[psutil.Process]:
        """It and every process below it."""
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def child(self, word: str) -> psutil.Process:
        """The one child whose command line has `word`; one that is being started again is waited for."""
        me = psutil.Process(self.process.pid)
        deadline = time.monotonic() + 90
        while True:
            words = of_each(me.children(), lambda child: (child, " ".join(child.cmdline())))
            found = [child for child, command in words if word in command]
            if len(found) == 1:
                return found[0]
            assert time.monotonic() < deadline, words
            time.sleep(0.05)

    def end(self, how: signal.Signals = signal.SIGTERM, *, timeout_s: float = 90) -> int:
        """Send a signal, and return the exit status."""
        self.process.send_signal(how)
        status = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return status

    def close(self) -> None:
        """End it in any case."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launcher]]:
    """Start launchers over `tmp_path / "data"`, without a worker unless told so."""
    started: list[Launcher] = []

    def start(*arguments: str, worker: bool = False, **env: str) -> Launcher:
        given = ["--data-dir", str(tmp_path / "data"), *arguments]
        launcher = Launcher(given if worker else [*given, "--no-worker"], env)
        started.append(launcher)
        return launcher

    yield start
    for launcher in started:
        launcher.close()
