"""Every error that leaves the API: OpenAI's envelope, `{"error": {message, type, param, code}}`, all four keys.

`answer` turns any exception into its response; the handlers FastAPI calls and the outermost middleware both use it,
so there is one place that decides what a user gets to see. A user never sees a traceback.
"""

from collections.abc import Mapping
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.exc import DataError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from api.validation import explain
from service.errors import (
    InvalidApiKey,
    InvalidRequest,
    RangeNotSatisfiable,
    ServiceError,
    Unavailable,
)
from service.logging import get_logger

log = get_logger(__name__)

RETRY_AFTER_S = 5
"""What a 429 or 503 asks a client to wait; the SDK honours it."""


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorOut(BaseModel):
    """The envelope of every error."""

    error: ErrorDetail


def errors(*kinds: type[ServiceError]) -> dict[int | str, dict[str, Any]]:
    """Return a route's `responses=`: which of our errors it answers, for the API's documentation."""
    return {
        kind.status: {"model": ErrorOut, "description": (kind.__doc__ or "").strip().split("\n")[0]}
        for kind in (*kinds, InvalidApiKey)
    }


def install(app: FastAPI) -> None:
    """Make `answer` the handler of every error we expect; what is left ends in the outermost middleware."""

    async def handle(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code in {404, 405}:
            return _of_unknown(request, error)
        return answer(error)

    for kind in (
        ServiceError,
        HTTPException,
        RequestValidationError,
        OperationalError,
        InterfaceError,
        PoolTimeout,
        DataError,
    ):
        app.add_exception_handler(kind, handle)


def answer(error: Exception) -> Response:
    """Return the response that tells a user of `error`; what we did not expect is logged with its traceback."""
    if isinstance(error, ServiceError):
        return _render(error)
    if isinstance(error, HTTPException):
        return _of_http(error)
    if isinstance(error, RequestValidationError):
        problem = explain(error)
        return _render(InvalidRequest(problem.message, param=problem.param, code=problem.code))
    if isinstance(error, (OperationalError, InterfaceError, PoolTimeout)):
        log.error("database_unavailable", error=str(error))
        return _render(Unavailable("The database does not answer just now. Try again in a moment."))
    if isinstance(error, DataError):
        log.warning("value_not_storable", error=str(error.orig))
        return _render(
            InvalidRequest(
                "The request holds a value that cannot be stored: a NUL character, or a number out of range.",
                code="invalid_value",
            )
        )
    log.error("unexpected_error", exc_info=error)
    request_id = structlog.contextvars.get_contextvars().get("request_id", "unknown")
    return _envelope(
        500,
        message=f"The server had an error while processing your request (request id: {request_id}).",
        type_="server_error",
        code="internal_error",
    )


def _render(error: ServiceError) -> Response:
    headers: dict[str, str] = {}
    if error.status in {429, 503}:
        headers["retry-after"] = str(RETRY_AFTER_S)
    if error.should_retry is not None:
        headers["x-should-retry"] = "true" if error.should_retry else "false"
    if isinstance(error, RangeNotSatisfiable):
        headers["content-range"] = f"bytes */{error.size}"
    if error.status == InvalidApiKey.status:
        headers["www-authenticate"] = "Bearer"
    return _envelope(
        error.status,
        message=error.message,
        type_=error.type,
        param=error.param,
        code=error.code,
        headers=headers,
    )


def _of_unknown(request: Request, error: HTTPException) -> Response:
    asked = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        message, code = f"Invalid URL ({asked})", "unknown_url"
    else:
        message, code = f"Not allowed: {asked}; another method may be", "method_not_supported"
    return _envelope(
        error.status_code,
        message=f"{message}. Every address is described at /docs.",
        type_="invalid_request_error",
        code=code,
        headers=error.headers,
    )


def _of_http(error: HTTPException) -> Response:
    type_ = "invalid_request_error" if error.status_code < 500 else "server_error"
    return _envelope(
        error.status_code, message=str(error.detail), type_=type_, headers=error.headers
    )


def _envelope(
    status: int,
    *,
    message: str,
    type_: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    detail = ErrorDetail(message=message, type=type_, param=param, code=code)
    # A name from the request may hold half a surrogate pair, which UTF-8 cannot carry.
    content = {"error": {k: _encodable(v) for k, v in detail.model_dump().items()}}
    return JSONResponse(content, status_code=status, headers=dict(headers or {}))


def _encodable(text: str | None) -> str | None:
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()
