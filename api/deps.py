"""What routes are given: a session, the caller, settings, storage, the catalog.

`SessionDep` is one transaction per request, committed before the answer is sent (`scope="function"`: a failing commit
answers an error, not a success). Async routes that live long (uploads, SSE) take `StateDep` and make short transactions
of their own instead: a session held for an upload's time would empty the pool.
"""

import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated

import anyio
from anyio.to_thread import run_sync
from fastapi import Depends, Request
from fastapi.security import HTTPBearer
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from service.errors import InvalidApiKey
from service.events.feed import Feed
from service.keys.actions import Caller
from service.models.catalog import Catalog
from service.queue.kick import Doorbell
from service.settings import Settings
from service.storage import Storage

_POOL_SIZE = 10
_MAX_TRANSACTIONS = 16
"""Of the pool's 20 connections. Were a request to wait for a connection in a thread, while those that hold one wait for
a thread, all would stand still; so requests wait here instead, holding neither, and 4 are left for short transactions."""

_MAX_PROBES = 4
"""Threads of their own for `/readyz`, which must answer while requests fill all others, waiting for a server that hangs."""

_MAX_STREAM_READS = 2
"""Of those 4: event streams read often, and must leave room for the keys of requests."""


@dataclass(frozen=True)
class State:
    """What the process has, made once in `create_app`."""

    settings: Settings
    engine: Engine
    probe_engine: Engine
    """Without a pool and with little patience: `/readyz` asks whether a new connection would be answered."""
    sessions: sessionmaker[Session]
    storage: Storage
    catalog: Catalog
    doorbell: Doorbell
    feed: Feed
    metrics: CollectorRegistry = field(default_factory=CollectorRegistry)
    is_set_up: threading.Event = field(default_factory=threading.Event)
    """Set once the first key is there."""
    transactions: anyio.CapacityLimiter = field(
        default_factory=lambda: anyio.CapacityLimiter(_MAX_TRANSACTIONS)
    )
    probes: anyio.CapacityLimiter = field(
        default_factory=lambda: anyio.CapacityLimiter(_MAX_PROBES)
    )
    stream_reads: anyio.CapacityLimiter = field(
        default_factory=lambda: anyio.CapacityLimiter(_MAX_STREAM_READS)
    )


def get_state(request: Request) -> State:
    """Return the process's state."""
    state: State = request.app.state.nibble
    return state


def get_settings(request: Request) -> Settings:
    """Return the settings in force."""
    return get_state(request).settings


def get_storage(request: Request) -> Storage:
    """Return the blob storage."""
    return get_state(request).storage


def get_catalog(request: Request) -> Catalog:
    """Return the catalog of base models."""
    return get_state(request).catalog


def get_doorbell(request: Request) -> Doorbell:
    """Return what wakes the workers."""
    return get_state(request).doorbell


async def get_session(request: Request) -> AsyncIterator[Session]:
    """Give one transaction, committed when the route returns and rolled back when it raises."""
    state = get_state(request)
    async with state.transactions:
        session = state.sessions()
        try:
            yield session
            await run_sync(session.commit)
        finally:
            # Also when the server is stopping and this task is cancelled: the connection must go back.
            with anyio.CancelScope(shield=True):
                await run_sync(session.close)


def get_caller(request: Request) -> Caller:
    """Return who calls. The key was checked by `api.middleware.Authenticate`, before any of the body was read."""
    caller = request.scope.get("nibble.caller")
    if not isinstance(caller, Caller):
        raise InvalidApiKey("This address needs an API key.")
    return caller


_bearer = HTTPBearer(auto_error=False, description="An API key: `sk-nibble-…`")

StateDep = Annotated[State, Depends(get_state)]
SessionDep = Annotated[Session, Depends(get_session, scope="function")]
CallerDep = Annotated[Caller, Depends(get_caller)]
SettingsDep = Annotated[Settings, Depends(get_settings)]
StorageDep = Annotated[Storage, Depends(get_storage)]
CatalogDep = Annotated[Catalog, Depends(get_catalog)]
DoorbellDep = Annotated[Doorbell, Depends(get_doorbell)]
DocumentsBearer = Depends(_bearer)
"""For routers' `dependencies=`: puts the key into the API's documentation, checks nothing."""
