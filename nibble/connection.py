"""Which service to speak to, and with which key.

Keys come from variables or from the file that a local service wrote at its first start, never from arguments: those
are seen by every user of the machine (`ps`). `openai` is imported late: it takes longer than `--help` should.
"""

import ipaddress
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from nibble import failures
from nibble.endings import refused

if TYPE_CHECKING:
    from openai import OpenAI, Stream

DEFAULT_BASE_URL = "http://127.0.0.1:8000/v1"
RETRIES = 4
"""Of the SDK's own, about eight seconds in all: a restarting service is waited for."""
SILENCE_S = 60.0
"""A body without a byte for so long is broken: on an event stream the service sends a comment every few seconds."""


@dataclass(frozen=True)
class Connection:
    """Where to and as whom; `key_source` names where the key came from, for messages."""

    base_url: str
    api_key: str
    key_source: str


def resolve(base_url: str | None, environ: Mapping[str, str] = os.environ) -> Connection:
    """Find the service's address and a key for it.

    Raises:
        Ending: the address is not an http(s) URL, or there is no key (refused).
    """
    url = base_url or environ.get("NIBBLE_BASE_URL") or environ.get("OPENAI_BASE_URL")
    url = check_base_url(url or DEFAULT_BASE_URL)
    for variable in ("NIBBLE_API_KEY", "OPENAI_API_KEY"):
        if key := environ.get(variable, "").strip():
            return Connection(url, _check_key(key, variable), variable)
    file = first_key_file(environ)
    if is_local(url):
        try:
            return Connection(url, _check_key(file.read_text().strip(), str(file)), str(file))
        except (OSError, UnicodeDecodeError):
            pass  # there is no service of this user's here; the message below says what to do
    raise refused(
        "no API key: set NIBBLE_API_KEY (whoever runs the service makes one with `nibble keys create`)."
    )


def connect(base_url: str | None) -> "OpenAI":
    """The SDK's client for the service that `resolve` finds."""
    import openai

    where = resolve(base_url)
    client = openai.OpenAI(
        base_url=where.base_url,
        api_key=where.api_key,
        max_retries=RETRIES,
        timeout=openai.Timeout(120.0, connect=10.0),
    )
    failures.name_service(where.base_url, where.key_source)
    return client


def open_body(client: "OpenAI", path: str, headers: Mapping[str, str]) -> "Stream[object]":
    """A response whose body is read as it comes, by `read_body`; a minute's silence breaks it.

    The SDK's documented way to endpoints that it does not know. Nothing is tried again here.
    """
    import openai

    return client.with_options(max_retries=0).get(
        path,
        cast_to=object,
        stream=True,
        stream_cls=openai.Stream[object],
        options={"headers": headers, "timeout": openai.Timeout(SILENCE_S, connect=10.0)},
    )


def read_body(stream: "Stream[object]") -> Iterator[bytes]:
    """Yield the body's bytes.

    Raises:
        APIConnectionError: it broke off. The SDK lets the errors of its HTTP library through here, and which one
            that is depends on its version.
    """
    import openai

    try:
        yield from stream.response.iter_bytes()
    except Exception as error:
        raise openai.APIConnectionError(request=stream.response.request) from error


def first_key_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Where a service that this user started keeps its first key (`service.settings` says the same)."""
    data_dir = environ.get("NIBBLE_DATA_DIR")
    folder = Path(data_dir) if data_dir else Path.home() / ".local" / "share" / "nibble"
    return folder.expanduser() / "first-api-key"


def check_base_url(url: str) -> str:
    """A usable base URL: http or https, a host, and `/v1` where no path was given."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise refused(f"{url!r} is not the address of a service: give one like {DEFAULT_BASE_URL}.")
    return url.rstrip("/") + ("/v1" if urlsplit(url).path in ("", "/") else "")


def is_local(url: str) -> bool:
    """Whether `url` names this machine by a loopback address."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_key(key: str, source: str) -> str:
    if not key or not key.isascii() or not key.isprintable():
        raise refused(f"the API key in {source} is empty or has letters that no key has.")
    return key
