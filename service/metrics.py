"""What Prometheus is told, and who may read it.

Counts and durations only: no project, job, model or file is ever a label. Each process has a registry of its own; what the
database knows (jobs, attempts, leases, workers) is asked for at each scrape of the API, so that it survives restarts and
is the same from every API process.
"""

import hmac
import ipaddress
from collections.abc import Callable, Iterable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from service.census import repository as census
from service.db import transaction
from service.settings import Settings

CONTENT_TYPE = CONTENT_TYPE_LATEST
WORKER_SILENCE_S = 45.0
"""A worker signs in every ten seconds."""
_STATUSES = ("validating_files", "queued", "running", "paused")
_KINDS = ("validate", "train")

FORBIDDEN = (
    "Metrics are for this machine alone until NIBBLE_METRICS_TOKEN is set; then they are for whoever sends it as a"
    " bearer token."
)


def may_read(
    settings: Settings, *, authorization: str | None, client: str | None, is_forwarded: bool
) -> bool:
    """Say whether a request may read metrics: with the token where one is set, else from this machine alone.

    Args:
        settings: the service's.
        authorization: the request's header of this name.
        client: the address that it comes from.
        is_forwarded: whether a proxy says that it comes from elsewhere.
    """
    if settings.metrics_token is not None:
        wanted = f"Bearer {settings.metrics_token.get_secret_value()}"
        return hmac.compare_digest((authorization or "").encode(), wanted.encode())
    return not is_forwarded and _is_here(client)


def _is_here(client: str | None) -> bool:
    try:
        return ipaddress.ip_address(client or "").is_loopback
    except ValueError:
        return False


def rendered(registry: CollectorRegistry) -> bytes:
    """Return a registry's metrics in Prometheus' text format."""
    return generate_latest(registry)


class ServiceCollector(Collector):
    """What the database and the disk know, asked for at each scrape."""

    def __init__(
        self,
        settings: Settings,
        sessions: sessionmaker[Session],
        free_bytes: Callable[[], int | None],
    ) -> None:
        """`sessions` over connections of little patience: a scrape must not wait for a database that hangs."""
        self._settings = settings
        self._sessions = sessions
        self._free_bytes = free_bytes

    def describe(self) -> Iterable[Metric]:
        """Return nothing: registering must not ask the database for names."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Ask; where the database is away, say only that."""
        yield from self._disk()
        up = GaugeMetricFamily("nibble_database_up", "Whether the database answered this scrape.")
        try:
            with transaction(self._sessions) as session:
                told = [*_jobs(session), *_attempts(session), *_workers(session, self._settings)]
        except SQLAlchemyError:
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        yield from told

    def _disk(self) -> Iterable[Metric]:
        try:
            free = self._free_bytes()
        except OSError:  # the folder is gone, or its disk
            free = None
        if free is not None:
            yield GaugeMetricFamily(
                "nibble_storage_free_bytes", "Free space where blobs are kept.", value=free
            )
        yield GaugeMetricFamily(
            "nibble_storage_min_free_bytes",
            "The free space that every upload must leave.",
            value=self._settings.min_free_bytes,
        )


def _jobs(session: Session) -> Iterable[Metric]:
    count = GaugeMetricFamily("nibble_jobs", "Jobs that have not ended.", labels=["status"])
    age = GaugeMetricFamily(
        "nibble_jobs_oldest_seconds",
        "For how long the oldest job of this status has been so; 0 where there is none.",
        labels=["status"],
    )
    live = census.live_jobs(session)
    for status in _STATUSES:
        n, age_s = live.get(status, (0, 0.0))
        count.add_metric([status], n)
        age.add_metric([status], age_s)
    yield from (count, age)


def _attempts(session: Session) -> Iterable[Metric]:
    claims = CounterMetricFamily(
        "nibble_claims", "Attempts that workers have begun.", labels=["kind"]
    )
    ended = CounterMetricFamily(
        "nibble_attempts_ended", "Attempts that have ended.", labels=["kind", "outcome"]
    )
    counts = census.attempts(session)
    for kind in _KINDS:
        claims.add_metric([kind], sum(n for (k, _), n in counts.items() if k == kind))
    for (kind, outcome), n in sorted(counts.items()):
        if outcome != "running":
            ended.add_metric([kind, outcome], n)
    yield from (claims, ended)


def _workers(session: Session, settings: Settings) -> Iterable[Metric]:
    workers = GaugeMetricFamily(
        "nibble_workers", "Workers by whether they are heard of.", labels=["state"]
    )
    workers.add_metric(["heard"], len(census.workers(session, within_s=WORKER_SILENCE_S)))
    workers.add_metric(["silent"], census.silent_workers(session, within_s=WORKER_SILENCE_S))
    slots = GaugeMetricFamily(
        "nibble_slots", "Slots of the workers that are heard of.", labels=["kind"]
    )
    busy = GaugeMetricFamily(
        "nibble_slots_busy", "Of these slots, those that have a job.", labels=["kind"]
    )
    for kind in _KINDS:
        total, held = census.slots(session, kind, within_s=WORKER_SILENCE_S)
        slots.add_metric([kind], total)
        busy.add_metric([kind], held)
    overdue = GaugeMetricFamily(
        "nibble_leases_overdue",
        "Leases that ended so long ago that they should have been taken back.",
        value=census.ended_leases(
            session, longer_than_s=settings.lease_s / 4 + 3 * settings.reap_s
        ),
    )
    yield from (workers, slots, busy, overdue)
