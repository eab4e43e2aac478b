"""What a worker tells Prometheus, on a port of its own: its claims, its attempts' ends, lost leases, steps, and its GPUs.

NIBBLE_WORKER_METRICS_PORT opens it. What the database knows is told by the API; here is what only the worker sees.
"""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service import metrics
from service.logging import get_logger
from service.settings import Settings
from worker.gpu import Gpu
from worker.gpu_load import load_of

log = get_logger(__name__)

_STEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


@dataclass(frozen=True)
class WorkerMetrics:
    """One per worker process; safe to use from its threads."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    claims: Counter = field(init=False)
    ended: Counter = field(init=False)
    leases_lost: Counter = field(init=False)
    step_seconds: Histogram = field(init=False)

    def __post_init__(self) -> None:
        """Name what is counted."""

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(f"nibble_worker_{name}", meaning, labels, registry=self.registry)

        made = {
            "claims": counter("claims", "Attempts that this worker has begun.", "kind"),
            "ended": counter(
                "attempts_ended", "How its attempts ended, as it judged.", "kind", "outcome"
            ),
            "leases_lost": counter(
                "leases_lost",
                "Attempts that it had to stop since the job had become another's.",
                "kind",
            ),
            "step_seconds": Histogram(
                "nibble_worker_step_seconds",
                "How long the optimizer's steps took; the rate of its count is steps per second.",
                buckets=_STEP_BUCKETS,
                registry=self.registry,
            ),
        }
        for name, metric in made.items():
            object.__setattr__(self, name, metric)


class GpuCollector(Collector):
    """The GPUs of this worker, asked of their driver at each scrape."""

    def __init__(self, gpus: list[Gpu]) -> None:
        self._gpus = gpus

    def describe(self) -> Iterable[Metric]:
        """Return nothing: registering must not ask the driver."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Ask; a GPU that does not answer is left out."""
        labels = ["uuid", "name"]
        total = GaugeMetricFamily("nibble_gpu_memory_bytes", "Memory of the GPU.", labels=labels)
        used = GaugeMetricFamily(
            "nibble_gpu_memory_used_bytes", "Memory of the GPU that anybody uses.", labels=labels
        )
        busy = GaugeMetricFamily(
            "nibble_gpu_utilization_ratio",
            "The share of the last moments in which a kernel ran, 0 to 1.",
            labels=labels,
        )
        for one in self._gpus:
            load = load_of(one)
            if load is None:
                continue
            names = [one.uuid, one.name]
            total.add_metric(names, one.memory_bytes)
            used.add_metric(names, load.memory_used_bytes)
            if load.utilization is not None:
                busy.add_metric(names, load.utilization)
        yield from (total, used, busy)


def serve(registry: CollectorRegistry, settings: Settings) -> Callable[[], None]:
    """Answer `GET /metrics` from a thread of its own, and return the function that stops it.

    A port that is taken is told and left: training goes on without being watched.
    """
    if settings.worker_metrics_port is None:
        return lambda: None
    address = (settings.worker_metrics_host, settings.worker_metrics_port)
    try:
        server = ThreadingHTTPServer(address, _handler(registry, settings))
    except OSError as error:
        log.warning("metrics_not_served", address=address, reason=error.strerror or str(error))
        return lambda: None
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    log.info("metrics_served", host=address[0], port=server.server_address[1])

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)

    return stop


def _handler(registry: CollectorRegistry, settings: Settings) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # of a client that says nothing

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self._answer(HTTPStatus.NOT_FOUND, b"Metrics are at /metrics.\n")
            elif not metrics.may_read(
                settings,
                authorization=self.headers.get("authorization"),
                client=self.client_address[0],
                is_forwarded="x-forwarded-for" in self.headers or "forwarded" in self.headers,
            ):
                self._answer(HTTPStatus.FORBIDDEN, f"{metrics.FORBIDDEN}\n".encode())
            else:
                self._answer(HTTPStatus.OK, metrics.rendered(registry), metrics.CONTENT_TYPE)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (the base's name)
            log.debug("metrics_request", line=format % args)

        def _answer(
            self, status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8"
        ) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler
