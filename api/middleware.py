"""What happens around every request, outermost first: headers and errors, the key, the JSON body.

All three are plain ASGI: they act before a byte of the body is read, and streams pass through untouched.
"""

import logging
import re
import time
from collections.abc import Awaitable, Callable

import structlog
from anyio.to_thread import run_sync
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.body import UnreadBody, check_query, read_json_body
from api.deps import State
from api.errors import answer
from api.request_metrics import RequestMetrics
from service.db import transaction
from service.errors import InvalidApiKey, InvalidRequest
from service.ids import new_id
from service.keys.actions import Caller, authenticate
from service.logging import get_logger

log = get_logger(__name__)

OPENAI_VERSION = "2020-10-01"
_PROBES = {"/healthz", "/readyz", "/metrics"}
"""Asked every few seconds by whoever watches over the process."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{8,64}")
_NO_KEY = (
    "You did not provide an API key. Send it in an Authorization header: 'Authorization: Bearer YOUR_KEY'."
    " `nibble up` prints where the first key is kept."
)


class RequestContext:
    """Gives a request its id, its log line, OpenAI's headers, and its answer when something was raised."""

    def __init__(self, app: ASGIApp, organization_id: str, metrics: RequestMetrics) -> None:
        self._app = app
        self._organization_id = organization_id
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = _request_id(Headers(scope=scope))
        status = 0
        body = UnreadBody(scope, receive)

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["openai-organization"] = self._organization_id
                headers["openai-version"] = OPENAI_VERSION
                headers["openai-processing-ms"] = _ms_since(started)
                if body.unread:
                    headers["connection"] = "close"
            await body.send_last(message, send)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, body.receive, send_with_headers)
            except ClientDisconnect:
                log.info("client_disconnected", method=scope["method"], path=scope["path"])
                return
            except Exception as error:
                if status:  # too late for another answer: break the connection, so that nobody takes it for whole
                    log.exception("response_broken_off")
                    raise
                await answer(error)(scope, body.receive, send_with_headers)
            self._metrics.observe(scope, status=status, seconds=time.perf_counter() - started)
            log.log(
                logging.DEBUG if scope["path"] in _PROBES else logging.INFO,
                "request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                duration_ms=_ms_since(started),
                **_job_of(scope),
            )


class Authenticate:
    """Lets nobody into /v1 without a key, whatever route they ask for, and before any of the body is read."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and _is_api(scope):
            if "\x00" in scope["path"]:
                raise InvalidRequest("The address holds a NUL character.", code="invalid_value")
            check_query(scope["query_string"])
            secret = bearer_secret(Headers(scope=scope))
            scope["nibble.caller"] = await run_sync(self._caller, secret)
        await self._app(scope, receive, send)

    def _caller(self, secret: str) -> Caller:
        with transaction(self._state.sessions) as session:
            return authenticate(session, secret)


class JsonBody:
    """Reads what is not an upload whole, bounded and checked, so that routes only see sound JSON or nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and _is_api(scope) and not _is_upload(scope):
            receive = _replay(await read_json_body(scope, receive), receive)
        await self._app(scope, receive, send)


def bearer_secret(headers: Headers) -> str:
    """Return the key of an Authorization header; spaces inside it are part of it.

    Raises:
        InvalidApiKey: there is none.
    """
    scheme, _, secret = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise InvalidApiKey(_NO_KEY)
    return secret.strip()


def _is_api(scope: Scope) -> bool:
    path: str = scope["path"]
    return path == "/v1" or path.startswith("/v1/")


def _is_upload(scope: Scope) -> bool:
    return scope["method"] == "POST" and scope["path"] == "/v1/files"


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else new_id("req_")


def _job_of(scope: Scope) -> dict[str, str]:
    """Return the id of the job that the address names, for the log's line."""
    job_id = scope.get("path_params", {}).get("job_id")
    return {"job_id": job_id} if isinstance(job_id, str) else {}


def _ms_since(started: float) -> str:
    return str(int((time.perf_counter() - started) * 1000))


def _replay(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    """Return a `receive` that gives `body` once, and afterwards waits for the client to go, as servers do."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay
