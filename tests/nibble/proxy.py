"""A TCP proxy in front of a service, that can be told to break connections the way networks do."""

import re
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

_REQUEST = re.compile(rb"^(GET|POST|DELETE|HEAD) (\S+) HTTP/1\.1\r\n")
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST


@dataclass
class Cut:
    """Answers to requests whose line matches are cut after so many bytes, so many times."""

    pattern: str
    after_bytes: int
    times: int


class Proxy:
    """Listens on a free port of 127.0.0.1 while the `with` block runs.

    `requests` are the heads of all requests seen, as text; `refused` is a pattern of paths that are answered 404 here.
    """

    def __init__(self, upstream_port: int) -> None:
        self._upstream = ("127.0.0.1", upstream_port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._stopped = False
        self._cuts: list[Cut] = []
        self.requests: list[str] = []
        self.refused: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"

    def cut(self, pattern: str, *, after_bytes: int, times: int = 1) -> None:
        self._cuts.append(Cut(pattern, after_bytes, times))

    def heal(self) -> None:
        """Cut nothing any more."""
        self._cuts.clear()

    def seen(self, pattern: str) -> list[str]:
        return [head for head in self.requests if re.search(pattern, head)]

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Break every connection and listen no more."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            self._stopped = True
            broken = list(self._open)
        for connection in broken:
            self._break(connection)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._upstream, timeout=10)
                server.settimeout(None)
            except OSError:
                return
            pair = _Pair(client, server)
            with self._lock:
                self._open |= {client, server}
                stopped = self._stopped
            if stopped:  # it was accepted before the stop, and the stop did not see it
                self._break(client)
                self._break(server)
                return
            threading.Thread(target=self._forward, args=(pair,), daemon=True).start()
            threading.Thread(target=self._return, args=(pair,), daemon=True).start()

    def _forward(self, pair: "_Pair") -> None:
        with suppress(OSError):
            while data := pair.client.recv(65536):
                if found := _REQUEST.match(data):
                    head = data.partition(b"\r\n\r\n")[0].decode("latin-1")
                    self.requests.append(head)
                    if self.refused and re.search(self.refused, found[2].decode()):
                        pair.client.sendall(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
                        continue
                    pair.left_bytes = self._allowance(head)
                pair.server.sendall(data)
        self._break(pair.server)

    def _return(self, pair: "_Pair") -> None:
        with suppress(OSError):
            while data := pair.server.recv(65536):
                if pair.left_bytes is not None:
                    data = data[: pair.left_bytes]
                    pair.left_bytes -= len(data)
                pair.client.sendall(data)
                if pair.left_bytes == 0:
                    # FIN rather than RST: what was sent so far arrives before the break does.
                    pair.client.shutdown(socket.SHUT_WR)
                    break
        self._break(pair.server)
        with suppress(OSError):
            # Closing alone would not end it while the other thread waits for its next byte.
            pair.client.shutdown(socket.SHUT_RDWR)
        pair.client.close()

    def _allowance(self, head: str) -> int | None:
        with self._lock:
            for cut in self._cuts:
                if cut.times > 0 and re.search(cut.pattern, head):
                    cut.times -= 1
                    return cut.after_bytes
        return None

    def _break(self, connection: socket.socket) -> None:
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._open.discard(connection)


@dataclass
class _Pair:
    client: socket.socket
    server: socket.socket
    left_bytes: int | None = None
