"""For launchers, containers and load balancers: no key needed."""

from typing import Literal

from anyio.to_thread import run_sync
from fastapi import APIRouter, Response
from pydantic import BaseModel

from api import readiness
from api.deps import StateDep

router = APIRouter(tags=["Health"])


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Whether requests can be served, and what each part lacks if not."""

    status: Literal["ready", "not_ready"]
    checks: dict[str, str]


@router.get("/healthz")
async def healthz() -> Health:
    """Say that the process lives, whatever it stands on."""
    return Health()


@router.get("/readyz", responses={503: {"model": Readiness, "description": "Not ready."}})
async def readyz(response: Response, state: StateDep) -> Readiness:
    """Say whether requests can be served: database, migrations, broker and first key are there."""
    checks = await run_sync(readiness.checks, state, limiter=state.probes)
    if all(value == readiness.OK for value in checks.values()):
        return Readiness(status="ready", checks=checks)
    response.status_code = 503
    return Readiness(status="not_ready", checks=checks)
