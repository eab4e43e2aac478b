"""The API's application: `create_app(settings)`.

Everything it stands on is opened here and closed when the server stops; a request never opens anything.
"""

import contextlib
from collections.abc import AsyncGenerator

from anyio.to_thread import run_sync
from fastapi import APIRouter, FastAPI

from api import errors, pages, readiness, schema
from api.deps import DocumentsBearer, State
from api.middleware import Authenticate, JsonBody, RequestContext
from api.request_metrics import RequestMetrics
from api.routes import adapters, checkpoints, events, files, health, jobs, metrics, models, queue
from api.startup import start_background
from service import db
from service.events.feed import Feed
from service.metrics import ServiceCollector
from service.models.catalog import Catalog
from service.queue.kick import Doorbell
from service.settings import Settings
from service.storage import Storage

DESCRIPTION = """\
Fine-tuning on your own machines, through OpenAI's API: point the official SDK's `base_url` here.
Authorize with the key whose place `nibble up` prints."""


def create_app(settings: Settings) -> FastAPI:
    """Return the application; it connects to the database on the first request, not here.

    Raises:
        DatabaseUrlMissing: no database is configured.
        RedisUrlMissing: no broker is configured.
        CatalogError: models.toml is missing or wrong.
        StorageUrlInvalid: the storage URL cannot be used.
        OSError: the data folder cannot be made.
    """
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    engine = db.connect(settings)
    state = State(
        settings=settings,
        engine=engine,
        probe_engine=db.connect(settings, pool_size=0, patience_s=readiness.ANSWER_WITHIN_S),
        sessions=db.sessions(engine),
        storage=Storage.open(settings),
        catalog=Catalog.load(settings.models_file),
        doorbell=Doorbell(settings),
        feed=Feed.of(settings),
    )
    state.metrics.register(
        ServiceCollector(settings, db.sessions(state.probe_engine), state.storage.free_bytes)
    )
    app = FastAPI(
        title="Nibble",
        version="0.1.0",
        description=DESCRIPTION,
        lifespan=_lifespan,
        docs_url=None,  # ours work offline: api.pages
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.nibble = state
    app.include_router(_v1())
    app.include_router(health.router)
    app.include_router(metrics.router)
    pages.mount(app)
    schema.install(app)
    errors.install(app)
    # The last one added is the outermost.
    app.add_middleware(JsonBody)
    app.add_middleware(Authenticate, state=state)
    app.add_middleware(
        RequestContext,
        organization_id=settings.organization_id,
        metrics=RequestMetrics(state.metrics),
    )
    return app


def _v1() -> APIRouter:
    router = APIRouter(prefix="/v1", dependencies=[DocumentsBearer])
    for resource in (files, jobs, events, checkpoints, adapters, queue, models):
        router.include_router(resource.router)
    return router


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncGenerator[None]:
    state: State = app.state.nibble
    stop = await run_sync(start_background, state)
    try:
        yield
    finally:
        await state.feed.close()
        await run_sync(stop)
        await run_sync(state.doorbell.close)
        await run_sync(state.engine.dispose)
