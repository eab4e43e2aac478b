"""The one place that reads the wall clock.

Leases never use it: their ends are computed by PostgreSQL, so a worker whose clock is off harms nothing.
"""

from datetime import UTC, datetime


def now() -> datetime:
    """Return the current time, aware, in UTC."""
    return datetime.now(UTC)  # noqa: TID251  (this is the clock)


def unix(moment: datetime) -> int:
    """Return whole seconds since 1970, the form OpenAI's API uses."""
    return int(moment.timestamp())
