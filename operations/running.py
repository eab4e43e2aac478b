"""Where the service runs that belongs to a data folder: what `nibble up` chose, for commands beside it."""

import re

from pydantic import SecretStr

from operations.embedded import postgres, valkey
from service.settings import Settings


def with_running_service(settings: Settings) -> Settings:
    """Fill in the servers and the port of a `nibble up` that runs over the data folder, where none are set."""
    found: dict[str, object] = {}
    if settings.database_url is None and (url := postgres.running_url(settings.data_dir)):
        found["database_url"] = SecretStr(url)
    if settings.redis_url is None and (url := valkey.running_url(settings.data_dir)):
        found["redis_url"] = SecretStr(url)
    if (port := _noted_port(settings)) is not None:
        found["port"] = port
    return settings.model_copy(update=found)


def _noted_port(settings: Settings) -> int | None:
    """Return the port that `nibble up` noted in its lock's file: it may have chosen one."""
    try:
        noted = (settings.data_dir / "lock").read_text("utf-8")
    except OSError:
        return None
    match = re.search(r"://\S+:(\d+)\s*$", noted)
    return int(match[1]) if match else None
