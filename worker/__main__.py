"""`python -m worker`: take work until told to stop; then give back what is not done, and end."""

import sys

from service import logging
from service.db import DatabaseUrlMissing
from service.models.catalog import CatalogError
from service.queue.broker import RedisUrlMissing
from service.settings import read_settings
from service.storage import StorageUrlInvalid
from worker.app import listen, make_worker_app
from worker.crew import Crew
from worker.metrics import GpuCollector, serve


def main() -> None:
    """Read the settings, start the slots, listen."""
    try:
        settings = read_settings()
        logging.configure(settings.log_level)
        crew = Crew(settings)
        app = make_worker_app(settings, crew)
    except (
        DatabaseUrlMissing,
        RedisUrlMissing,
        CatalogError,
        StorageUrlInvalid,
        ValueError,
        OSError,
    ) as error:
        sys.exit(f"nibble worker: {error}")
    if not crew.slots:
        sys.exit("nibble worker: there is nothing to do: no slot to train or to validate in")
    registry = crew.context.metrics.registry
    registry.register(
        GpuCollector([slot.place.gpu for slot in crew.slots if slot.place.gpu is not None])
    )
    stop_metrics = serve(registry, settings)
    crew.start()
    try:
        listen(app, crew)
    finally:
        crew.stop()
        stop_metrics()


if __name__ == "__main__":
    main()
