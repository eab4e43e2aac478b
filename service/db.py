"""Sessions and transactions over PostgreSQL (SQLAlchemy 2, psycopg 3, sync).

One transaction per request or task, committed at the edge; what must happen only after the commit (a kick) is
registered with `after_commit` and dropped on rollback.
"""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, NullPool, create_engine, event
from sqlalchemy.orm import Session, sessionmaker

from service.connection import give_up_after
from service.settings import Settings


class DatabaseUrlMissing(RuntimeError):
    """NIBBLE_DATABASE_URL is not set; `nibble up` brings its own server."""


_CONNECT_S = 5.0
_POOL_S = 10.0
"""How long a transaction waits for one of the connections, which a server that hangs does not give back."""


def connect(settings: Settings, *, pool_size: int = 10, patience_s: float | None = None) -> Engine:
    """Return an engine over the configured database; it connects on first use.

    Args:
        settings: the service's.
        pool_size: connections that are kept; as many again at most are made when they do not do. 0: each use makes its own.
        patience_s: how long the server may be silent, if not as long as the settings say.

    Raises:
        DatabaseUrlMissing: no database is configured.
    """
    if settings.database_url is None:
        msg = "NIBBLE_DATABASE_URL is not set: set it, or start with `nibble up`, which brings its own PostgreSQL"
        raise DatabaseUrlMissing(msg)
    patience_s = settings.database_patience_s if patience_s is None else patience_s
    pool: dict[str, Any] = {"poolclass": NullPool}
    if pool_size:
        pool = {"pool_size": pool_size, "max_overflow": pool_size, "pool_timeout": _POOL_S}
    engine = create_engine(
        settings.database_url.get_secret_value(),
        **pool,
        hide_parameters=True,  # errors end in logs, where training data have no business
        pool_pre_ping=True,  # a restarted server costs a new connection, not a failed request
        connect_args={
            "connect_timeout": math.ceil(min(_CONNECT_S, patience_s)),
            "application_name": "nibble",
            # A server that vanished without a word is an error within half a minute, not a thread that hangs.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 25_000,
        },
    )
    give_up_after(engine, patience_s)
    return engine


def sessions(engine: Engine) -> sessionmaker[Session]:
    """Return the factory every edge (request, task, loop) makes its one session from."""
    return sessionmaker(engine, expire_on_commit=False)


@contextmanager
def transaction(factory: sessionmaker[Session]) -> Generator[Session]:
    """One transaction: committed when the block ends well, rolled back when it raises."""
    with factory() as session, session.begin():
        yield session


def after_commit(session: Session, action: Callable[[], None]) -> None:
    """Run `action` once, after this session's transaction has committed; a rollback drops it."""

    def run(_: Session) -> None:
        event.remove(session, "after_rollback", drop)
        action()

    def drop(_: Session) -> None:
        event.remove(session, "after_commit", run)

    event.listen(session, "after_commit", run, once=True)
    event.listen(session, "after_rollback", drop, once=True)
