"""Forms made by hand, for what no SDK would send."""

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


def _part(disposition: str, content: bytes) -> bytes:
    head = f"Content-Disposition: form-data; {disposition}\r\n\r\n".encode()
    return b"--" + BOUNDARY + b"\r\n" + head + content + b"\r\n"
