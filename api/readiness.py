"""Is everything there that a request needs: the database, its newest schema, the first key, the broker?"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from api.deps import State

OK = "ok"
ANSWER_WITHIN_S = 2


def checks(state: State) -> dict[str, str]:
    """Return each part's name and "ok", or one sentence on what it lacks."""
    return {
        "database": _database(state),
        "redis": _redis(state),
        "first_key": OK if state.is_set_up.is_set() else "the first API key is not made yet",
    }


def _database(state: State) -> str:
    try:
        with state.probe_engine.connect() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
    except SQLAlchemyError:
        return "the database does not answer"
    wanted = _newest_revision()
    return (
        OK
        if current == wanted
        else f"the database is at migration {current}, not at {wanted}: migrate"
    )


@cache
def _newest_revision() -> str | None:
    spec = find_spec("migrations")
    if spec is None or spec.origin is None:
        return None
    return ScriptDirectory(str(Path(spec.origin).parent)).get_current_head()


def _redis(state: State) -> str:
    url = state.settings.redis_url
    if url is None:
        return "no broker is configured"
    # Celery's spelling of a Unix socket's address is not redis-py's.
    address = url.get_secret_value().replace("redis+socket://", "unix://", 1)
    try:
        client = Redis.from_url(  # pyright: ignore[reportUnknownMemberType]
            address, socket_timeout=ANSWER_WITHIN_S, socket_connect_timeout=ANSWER_WITHIN_S
        )
        with client:
            client.ping()  # pyright: ignore[reportUnknownMemberType]
    except RedisError:
        return "the broker (Redis or Valkey) does not answer"
    return OK
