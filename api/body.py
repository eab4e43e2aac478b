"""Bodies and queries of requests: how much of them is read, and what of JSON is refused before a route sees it.

Nothing here trusts a declared length: what comes is counted as well.
"""

import json
import re
from typing import cast
from urllib.parse import parse_qsl

import anyio
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from service.errors import InvalidRequest, TooLarge

MAX_JSON_BYTES = 1_000_000
MAX_JSON_DEPTH = 64
MAX_DRAIN_BYTES = 512 * 1024
IDLE_S: float = 60
_DRAIN_S = 1.0
_SUSPECT = re.compile(rb"\x00|\\u0000|\\u[dD][89abcdefABCDEF]")


async def read_json_body(scope: Scope, receive: Receive) -> bytes:
    """Read a body whole and return it, checked; b"" where there is none.

    Raises:
        TooLarge: it is over 1 MB, declared or real.
        InvalidRequest: it is not JSON, or holds what PostgreSQL cannot store (NUL, halves of characters).
        ClientDisconnect: the client went before its end.
    """
    headers = Headers(scope=scope)
    declared = headers.get("content-length", "")
    if declared.isdigit() and int(declared) > MAX_JSON_BYTES:
        raise _too_large()
    body = await _read(receive)
    if body.strip():
        _check_json(body, headers.get("content-type", ""))
        return body
    return b""


def check_query(query: bytes) -> None:
    """Refuse what PostgreSQL cannot store in the part of an address after its question mark.

    Raises:
        InvalidRequest: it names the parameter.
    """
    if b"%00" not in query and b"\x00" not in query:
        return
    for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if "\x00" in name + value:
            raise InvalidRequest(
                f"Invalid {name!r}: it holds a NUL character.", param=name, code="invalid_value"
            )


class UnreadBody:
    """Keeps count of whether a request's body was read to its end, and ends the connection well if it was not.

    An answer that comes before the body's end (a wrong key, a refused upload) closes the connection. To close while
    data wait unread would make the kernel send a reset, which can overtake the answer; so up to 512 KB are read and
    thrown away first, for a second at most.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        headers = Headers(scope=scope)
        has_body = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
        self.unread = has_body
        self._receive = receive

    async def receive(self) -> Message:
        """Receive on behalf of the application; 408 when a body that was begun does not go on."""
        try:
            with anyio.fail_after(IDLE_S if self.unread else None):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, f"Nothing came for {IDLE_S} seconds.") from None
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self.unread = False
        return message

    async def send_last(self, message: Message, send: Send) -> None:
        """Send, and before the answer's end drain what is unread of the body."""
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if not (is_last and self.unread):
            await send(message)
            return
        await send({**message, "more_body": True})
        await self._drain()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _drain(self) -> None:
        drained = 0
        with anyio.move_on_after(_DRAIN_S):
            while self.unread and drained < MAX_DRAIN_BYTES:
                drained += len((await self.receive()).get("body", b""))


async def _read(receive: Receive) -> bytes:
    pieces: list[bytes] = []
    total = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece = message.get("body", b"")
        total += len(piece)
        if total > MAX_JSON_BYTES:
            raise _too_large()
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)


def _too_large() -> TooLarge:
    return TooLarge(f"A JSON body may have {MAX_JSON_BYTES} bytes.", code="request_too_large")


def _check_json(body: bytes, content_type: str) -> None:
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        said = repr(kind) if kind else "nothing of its type"
        raise InvalidRequest(
            f"Send the body as JSON with 'Content-Type: application/json'; this one says {said}.",
            code="invalid_content_type",
        )
    try:
        value: object = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise _not_json(f"byte {error.start + 1} is not UTF-8") from error
    except RecursionError as error:
        raise _not_json("it is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise _not_json(f"line {error.lineno}, column {error.colno}: {error.msg}") from error
    except _NoJsonValue as error:
        raise _not_json(str(error)) from error
    except ValueError as error:  # Python's own limit to the digits of a number
        raise _not_json("it holds a number of too many digits") from error
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json")
    _check_depth(cast("object", value))
    if _SUSPECT.search(body):
        _check_storable(cast("object", value))


def _not_json(reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"We could not parse the JSON body of your request: {reason}.", code="invalid_json"
    )


class _NoJsonValue(ValueError):
    """Python's decoder would take it."""


def _refuse_constant(name: str) -> object:
    raise _NoJsonValue(f"{name} is not a JSON value")


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for item in level for child in _children(item)]
        if not level:
            return
    raise _not_json(f"it is nested more than {MAX_JSON_DEPTH} deep")


def _check_storable(value: object) -> None:
    pending: list[tuple[str, object]] = [("", value)]
    while pending:
        path, item = pending.pop()
        if isinstance(item, str) and not _is_storable(item):
            raise InvalidRequest(
                f"Invalid {path or 'body'!r}: a NUL character or half of a surrogate pair cannot be stored.",
                param=path or None,
                code="invalid_value",
            )
        if isinstance(item, dict):
            for key, child in cast("dict[str, object]", item).items():
                pending += [(path, key), (f"{path}.{key}".removeprefix("."), child)]
        elif isinstance(item, list):
            pending += [
                (f"{path}[{i}]", child) for i, child in enumerate(cast("list[object]", item))
            ]


def _children(item: object) -> list[object]:
    if isinstance(item, dict):
        return list(cast("dict[str, object]", item).values())
    return cast("list[object]", item) if isinstance(item, list) else []


def _is_storable(text: str) -> bool:
    return "\x00" not in text and not any("\ud800" <= c <= "\udfff" for c in text)
