"""`/openapi.json`: FastAPI's document, with our errors in place of its own.

FastAPI describes a 422 on every route that takes anything; we answer 400 with the envelope (`api.errors`).
"""

from typing import Any, cast

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api.errors import errors
from service.errors import InvalidRequest

_REPLACED = ("HTTPValidationError", "ValidationError")


def install(app: FastAPI) -> None:
    """Make the application serve the corrected document, made once, at the first request for it."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _corrected(
                get_openapi(
                    title=app.title,
                    version=app.version,
                    description=app.description,
                    routes=app.routes,
                )
            )
        return app.openapi_schema

    app.openapi = document


def _corrected(document: dict[str, Any]) -> dict[str, Any]:
    envelope = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorOut"}}}
    refused = {
        "description": errors(InvalidRequest)[InvalidRequest.status]["description"],
        "content": envelope,
    }
    for methods in document["paths"].values():
        for operation in methods.values():
            responses = cast("dict[str, Any]", operation["responses"])
            if responses.pop("422", None) is not None:
                responses.setdefault(str(InvalidRequest.status), refused)
            for status, response in responses.items():
                if status >= "400" and "application/json" not in response.get("content", {}):
                    response["content"] = envelope  # FastAPI thinks a stream's errors stream too
    for name in _REPLACED:
        document["components"]["schemas"].pop(name, None)
    return document
