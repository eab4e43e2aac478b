"""Requests as Prometheus sees them: how long each took, by method, by the route's template and by status.

The template (`/v1/files/{file_id}`), never the address: that has ids in it, and anybody may make up new ones.
"""

from typing import Any

from prometheus_client import CollectorRegistry, Histogram
from starlette.types import Scope

_METHODS = {"GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH"}
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class RequestMetrics:
    """The histogram of one application."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "nibble_http_request_seconds",
            "From a request's head to its answer's last byte; of a stream, for as long as it was open.",
            labelnames=["method", "route", "status"],
            buckets=_BUCKETS,
            registry=registry,
        )

    def observe(self, scope: Scope, *, status: int, seconds: float) -> None:
        """Note an answered request; call it when the routes have seen `scope`."""
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._seconds.labels(method, _template(scope), str(status)).observe(seconds)


def _template(scope: Scope) -> str:
    """Return the route's template; a route knows it without the prefixes (`/v1`) of the routers that it is in, which have no ids."""
    template: Any = getattr(scope.get("route"), "path_format", None)
    if not isinstance(template, str):
        return "unknown"
    path: str = scope["path"]
    prefix = path.split("/")[: path.count("/") - template.count("/") + 1]
    return "/".join(prefix) + template
