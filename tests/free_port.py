"""Ports for services that must be told theirs before they start."""

import random
import socket


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on.

    Below those that kernels give to outgoing connections, and drawn, so that nobody beside us takes it before its service has.
    """
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(20_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
