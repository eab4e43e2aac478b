"""Are PostgreSQL, the broker, the storage and the API there, of versions that do, at the newest schema, at the same time of day?"""

import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from operations import migrate
from operations.doctor.finding import Finding, fail, ok, warn
from operations.health import problem_of_api, reachable
from service.census import repository as census
from service.errors import ServiceError
from service.settings import Settings
from service.storage import BlobMissing, Storage, StorageUrlInvalid

OLDEST_POSTGRES = 14
"""The oldest that PostgreSQL's makers still mend when this is written."""
OLDEST_BROKER = (6, 2)
"""Of Redis; every Valkey says 7.2 there, the last Redis that it is."""
_ANSWER_WITHIN_S = 2
_CLOCK_S = 5.0


def examine_database(session: Session) -> Finding:
    """Ask PostgreSQL for its version; raises what SQLAlchemy raises when it does not answer."""
    number = census.server_version(session)
    version = f"PostgreSQL {number // 10_000}.{number % 10_000}"
    if number // 10_000 < OLDEST_POSTGRES:
        return fail(
            "database", version, f"move to PostgreSQL {OLDEST_POSTGRES} or later, 18 is best tried"
        )
    return ok("database", f"{version} answers")


def examine_migrations(engine: Engine) -> Finding:
    """Compare the database's schema with the newest one."""
    standing = migrate.standing(engine)
    if standing.is_newest:
        return ok("migrations", f"at the newest, {standing.newest}")
    if standing.is_known:
        return fail(
            "migrations",
            f"the database is at {standing.current or 'none'}, the newest is {standing.newest}",
            "stop API and workers, run `python -m operations.migrate`, start them again",
        )
    return fail(
        "migrations",
        f"the database is at {standing.current}, which this version of Nibble does not know",
        "a newer version made it: run that version, or restore a dump of before",
    )


def examine_clock(session: Session) -> Finding:
    """Compare this host's clock with the database's: leases go by the latter alone, times that people read do not."""
    before = time.time()
    there = census.database_time_s(session)
    after = time.time()
    ahead_s = (before + after) / 2 - there
    if abs(ahead_s) <= _CLOCK_S + (after - before) / 2:
        return ok("clock", f"within {_CLOCK_S:.0f} s of the database's")
    words = "ahead of" if ahead_s > 0 else "behind"
    return warn(
        "clock",
        f"this host's clock is {abs(ahead_s):.0f} s {words} the database's",
        "set it by NTP: no job is harmed, but times in stories and logs are off",
    )


def examine_broker(settings: Settings) -> Finding:
    """Ask Redis or Valkey for its version."""
    if settings.redis_url is None:
        return fail("broker", "none is configured", "set NIBBLE_REDIS_URL, or use `nibble up`")
    # Celery's spelling of a Unix socket's address is not redis-py's.
    address = settings.redis_url.get_secret_value().replace("redis+socket://", "unix://", 1)
    try:
        client = Redis.from_url(  # pyright: ignore[reportUnknownMemberType]
            address, socket_timeout=_ANSWER_WITHIN_S, socket_connect_timeout=_ANSWER_WITHIN_S
        )
        with client:
            about: dict[str, object] = dict(client.info("server"))  # pyright: ignore
    except (RedisError, OSError) as error:
        return fail(
            "broker",
            f"does not answer ({type(error).__name__})",
            "start it, or mend NIBBLE_REDIS_URL; until then work begins up to NIBBLE_POLL_S late",
        )
    name, version = ("Valkey", about["valkey_version"]) if "valkey_version" in about else (
        "Redis", about.get("redis_version", "0"))  # fmt: skip
    if tuple(int(part) for part in str(version).split(".")[:2]) < OLDEST_BROKER:
        return fail("broker", f"{name} {version}", "move to Redis 6.2, Valkey 7.2 or later")
    return ok("broker", f"{name} {version} answers")


def examine_storage(settings: Settings) -> Finding:
    """Ask for a blob that is not there. A folder that is missing, an unmounted one say, is told and not made."""
    place = urlsplit(settings.blobs_url)
    if place.scheme == "file" and not Path(unquote(place.path)).is_dir():
        todo = "mount it, mend NIBBLE_STORAGE_URL, or start the service, which makes it"
        return fail("storage", f"{unquote(place.path)} is no folder", todo)
    try:
        Storage.open(settings).size("nibble-doctor")
    except BlobMissing:
        return ok("storage", f"{settings.blobs_url.partition('://')[0]} storage answers")
    except (ServiceError, StorageUrlInvalid, OSError) as error:
        return fail("storage", str(error), "mend NIBBLE_STORAGE_URL, or who may reach it")
    return ok("storage", "answers")


def examine_api(settings: Settings) -> Finding:
    """Ask the API on this machine whether it is ready."""
    problem = problem_of_api(settings)
    where = f"{reachable(settings.host)} port {settings.port}"
    if problem is None:
        return ok("api", f"ready on {where}")
    return fail(
        "api",
        problem,
        "start it (`nibble up`, `python -m api`), or name its place with NIBBLE_HOST and NIBBLE_PORT",
    )
