"""For Prometheus."""

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response

from api.deps import StateDep
from service import metrics
from service.errors import Forbidden

router = APIRouter(tags=["Health"])

_OF_PROXIES = ("x-forwarded-for", "forwarded", "via", "x-real-ip")


@router.get("/metrics", response_class=Response, include_in_schema=False)
async def read_metrics(request: Request, state: StateDep) -> Response:
    """Tell Prometheus how the service does: from this machine, or with the token of NIBBLE_METRICS_TOKEN."""
    allowed = metrics.may_read(
        state.settings,
        authorization=request.headers.get("authorization"),
        client=request.client.host if request.client else None,
        is_forwarded=any(header in request.headers for header in _OF_PROXIES),
    )
    if not allowed:
        raise Forbidden(metrics.FORBIDDEN)
    content = await run_sync(metrics.rendered, state.metrics, limiter=state.probes)
    return Response(content, media_type=metrics.CONTENT_TYPE)
