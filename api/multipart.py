"""Reading multipart/form-data as it comes, nothing spooled: part by part, piece by piece.

python-multipart parses; it tells of the parts by callbacks, which are turned into a stream here. It does not say
whether the body was whole, so that is checked here too.
"""

import re
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from urllib.parse import unquote

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, MultipartState, parse_options_header

from service.errors import InvalidRequest

_EXTENDED_FILENAME = re.compile(rb"""filename\*=(?:utf-8|UTF-8)''([^;\s]+)""")


@dataclass(frozen=True)
class PartStart:
    """A part begins; `filename` is None for a plain field."""

    name: str
    filename: str | None


@dataclass(frozen=True)
class PartData:
    """The next bytes of the part."""

    data: bytes


@dataclass(frozen=True)
class PartEnd:
    """The part is over."""


Piece = PartStart | PartData | PartEnd


async def read_parts(content_type: str, body: AsyncIterator[bytes]) -> AsyncGenerator[Piece]:
    """Give the parts of a form while it comes in.

    Args:
        content_type: the request's header, with the boundary.
        body: the request's bytes.

    Raises:
        InvalidRequest: it is no multipart form, malformed, or cut off before its closing boundary.
    """
    parser = _Parser(content_type)
    async for data in body:
        for piece in parser.feed(data):
            yield piece
    parser.end()


class _Parser:
    def __init__(self, content_type: str) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data":
            found = (
                f"this request's content type is {content_type!r}"
                if content_type
                else "this request has no content type"
            )
            raise InvalidRequest(
                f"Send the file as multipart/form-data with the parts 'file' and 'purpose'; {found}.",
                code="invalid_content_type",
            )
        boundary = options.get(b"boundary")
        if not boundary:
            raise _malformed("its content type names no boundary")
        self._pieces: list[Piece] = []
        self._field = bytearray()
        self._value = bytearray()
        self._headers: dict[bytes, bytes] = {}
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._headers.clear,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_part_end": self._on_part_end,
                },
            )
        except FormParserError as error:
            raise _malformed("its boundary is too long") from error

    def feed(self, data: bytes) -> list[Piece]:
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _malformed(_reason(error)) from error
        pieces, self._pieces = self._pieces, []
        return pieces

    def end(self) -> None:
        if self._parser.state not in {MultipartState.END, MultipartState.END_BOUNDARY}:
            raise _malformed("it ends before its closing boundary")

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[bytes(self._field).lower()] = bytes(self._value)
        self._field.clear()
        self._value.clear()

    def _on_headers_finished(self) -> None:
        disposition = self._headers.get(b"content-disposition", b"")
        kind, options = parse_options_header(disposition)
        name = options.get(b"name")
        if kind != b"form-data" or not name:
            raise _malformed("a part has no name")
        filename = options.get(b"filename")
        if filename is None and (extended := _EXTENDED_FILENAME.search(disposition)):
            filename = unquote(extended.group(1).decode("latin-1")).encode()
        self._pieces.append(
            PartStart(
                name.decode("utf-8", "replace"),
                None if filename is None else filename.decode("utf-8", "replace"),
            )
        )

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._pieces.append(PartData(data[start:end]))

    def _on_part_end(self) -> None:
        self._pieces.append(PartEnd())


def _reason(error: FormParserError) -> str:
    """Translate the parser's words, which are about numbers of characters."""
    said = str(error)
    if said.startswith("Maximum"):
        return "a part has too many headers, or too long ones"
    if "header" in said:
        return "a part's headers are not well-formed"
    return "it does not keep to the boundary that its content type names"


def _malformed(reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"The body is not well-formed multipart/form-data: {reason}.",
        code="invalid_multipart",
    )
