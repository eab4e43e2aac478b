"""A server that hangs: all of its processes are stopped, and its sockets stay open."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from operations.embedded import postgres


@contextmanager
def stopped(server: postgres.Postgres) -> Iterator[None]:
    """Stop every process of a server, and let them go on at the end."""
    root = psutil.Process(server.process.pid)
    processes = [root, *root.children(recursive=True)]
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)
