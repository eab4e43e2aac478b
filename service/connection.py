"""A PostgreSQL connection that gives up on a server which says nothing.

A server that hangs (stopped, swapping, on a disk that does not answer) keeps its sockets open, and over a Unix socket no
setting of TCP's or of the server's own ends the wait: the client has to.
"""

import math
import time
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from sqlalchemy import Engine, event

T = TypeVar("T")


class ServerSilent(psycopg.OperationalError):
    """The server keeps the connection open and does not answer."""


class PatientConnection(psycopg.Connection[Any]):
    """Waits for an answer until `patience_s` after the server's last sign of life; then it closes and raises."""

    patience_s = math.inf

    def wait(self, gen: PQGen[T], *args: Any, **kwargs: Any) -> T:  # noqa: ANN401  (psycopg's own)
        """Consume a generator that operates on the connection.

        Raises:
            ServerSilent: what was asked may be done all the same, as when an answer is lost.
        """
        try:
            return super().wait(_heard_within(gen, self.patience_s), *args, **kwargs)
        except ServerSilent:
            self.close()
            raise


def give_up_after(engine: Engine, patience_s: float) -> None:
    """Have every connection of `engine` raise when a statement hears nothing of its server for so long."""

    def connect(_dialect: object, _record: object, args: Any, kwargs: Any) -> PatientConnection:  # noqa: ANN401
        connection = PatientConnection.connect(*args, **kwargs)
        connection.patience_s = patience_s
        return connection

    event.listen(engine, "do_connect", connect)


def _heard_within(gen: PQGen[T], patience_s: float) -> PQGen[T]:
    """Pass on a generator of psycopg's, which is sent 0 some times a second while its socket is not ready."""
    heard_at = time.monotonic()
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if ready:
                heard_at = time.monotonic()
            elif time.monotonic() - heard_at > patience_s:
                raise ServerSilent(f"the server has said nothing for {patience_s:g} s")
            wanted = gen.send(ready)
    except StopIteration as end:
        answer: T = end.value
        return answer
