"""Forms made by hand, for what no SDK would send."""

import contextlib
import socket
from collections.abc import Iterator

import httpx2

BOUNDARY = b"----nibble"
CONTENT_TYPE = {"content-type": "multipart/form-data; boundary=----nibble"}
END = b"--" + BOUNDARY + b"--\r\n"


def field(name: str, value: str) -> bytes:
    """Return a plain field."""
    return _part(f'name="{name}"', value.encode())


def file(content: bytes, filename: str | None = "a.jsonl", *, name: str = "file") -> bytes:
    """Return a file's part."""
    disposition = f'name="{name}"'
    if filename is not None:
        disposition += f'; filename="{filename}"'
    return _part(disposition, content)


def file_start(filename: str = "a.jsonl") -> bytes:
    """Return the beginning of a file's part, whose content follows and follows."""
    return file(b"", filename).removesuffix(b"\r\n")


def form(*parts: bytes) -> bytes:
    """Return a whole form."""
    return b"".join(parts) + END


@contextlib.contextmanager
def open_upload(url: str, key: str, *, head: bytes = b"", body: bytes) -> Iterator[socket.socket]:
    """Start an upload over a bare socket and leave it open."""
    address = httpx2.URL(url)
    with socket.create_connection((address.host, address.port or 0), timeout=60) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + key.encode() + b"\r\n"
            b"content-type: " + CONTENT_TYPE["content-type"].encode() + b"\r\n"
            + (head or b"content-length: 100000000\r\n") + b"\r\n" + body
        )  # fmt: skip
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """Read until the server closes, as it does when it has not read all of a body."""
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(8192):
            answer += data
    return answer


def _part(disposition: str, content: bytes) -> bytes:
    head = f"Content-Disposition: form-data; {disposition}\r\n\r\n".encode()
    return b"--" + BOUNDARY + b"\r\n" + head + content + b"\r\n"
