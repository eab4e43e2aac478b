"""The worker's ears: a Celery worker that hears kicks and rings the slots.

The tasks return at once. The work itself runs in the slots' own threads (worker.slot), so a broker that is away,
restarted or emptied touches no attempt, and a warm shutdown never waits for hours.
"""

import logging
import warnings

from celery import Celery
from celery.exceptions import SecurityWarning
from celery.signals import setup_logging, worker_shutting_down

from service.queue.broker import KINDS, Kind, make_app, task_name
from service.settings import Settings
from worker.crew import Crew

_ANSWER_WITHIN_S = 30.0


def make_worker_app(settings: Settings, crew: Crew) -> Celery:
    """Return the Celery app whose tasks ring `crew`."""
    app = make_app(settings, answer_within_s=_ANSWER_WITHIN_S)
    setup_logging.connect(_keep_our_logging, weak=False)
    for kind in KINDS:
        _add_kick(app, crew, kind)
    return app


def _keep_our_logging(**_: object) -> None:
    """Whoever listens to this signal keeps Celery from giving the root logger its own level, which hid attempts' lines."""
    level = max(logging.getLogger().level, logging.WARNING)
    logging.getLogger("celery").setLevel(level)  # else it tells of every kick


def _add_kick(app: Celery, crew: Crew, kind: Kind) -> None:
    @app.task(name=task_name(kind), ignore_result=True)
    def kick() -> None:  # pyright: ignore[reportUnusedFunction]  (registered under its name)
        crew.ring(kind)


def listen(app: Celery, crew: Crew) -> None:
    """Hear kicks until told to stop (SIGTERM, SIGINT); children are told at the first sign of it."""

    def stop(**_: object) -> None:
        crew.request_stop()

    worker_shutting_down.connect(stop, weak=False)
    kinds = sorted({slot.kind for slot in crew.slots})
    # Celery's advice for web servers' task queues; in a container, root is who we are.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    arguments = [
        "--quiet",
        "worker",
        "--pool=threads",
        f"--concurrency={max(1, len(crew.slots))}",
        f"--queues={','.join(kinds)}",
        f"--hostname={crew.context.worker_id}@{crew.context.host}",
        "--without-gossip",
        "--without-mingle",
        "--without-heartbeat",
    ]
    app.worker_main(arguments)
