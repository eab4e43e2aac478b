"""A server that hangs: all of its processes are stopped, and its sockets stay open."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from operations.embedded import postgres


@contextmanager
def stopped(server: postgres.Postgres) -> Iterator[None]:
    """Stop every process of a server, and let them go on at the end."""
    root = psutil.Process(server.process.pid)
    processes = [root, *root.children(recursive=True)]
    _send(signal.SIGSTOP, processes)
    try:
        yield
    finally:
        _send(signal.SIGCONT, processes)


def _send(number: signal.Signals, processes: list[psutil.Process]) -> None:
    for process in processes:
        # PostgreSQL's helpers come and go by themselves.
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
