"""`python -m api`: serve on the configured host and port until told to stop."""

import sys

import uvicorn

from api.main import create_app
from service import logging
from service.db import DatabaseUrlMissing
from service.models.catalog import CatalogError
from service.queue.broker import RedisUrlMissing
from service.settings import Settings
from service.storage import StorageUrlInvalid

_GRACE_S = 5
"""How long open streams (SSE, downloads) may hold up the end; clients resume both."""


def main() -> None:
    """Read the settings, make the application, serve it."""
    settings = Settings()
    try:
        logging.configure(settings.log_level)
        app = create_app(settings)
    except (
        DatabaseUrlMissing,
        RedisUrlMissing,
        CatalogError,
        StorageUrlInvalid,
        ValueError,
        OSError,
    ) as error:
        sys.exit(f"nibble api: {error}")
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,  # ours
        access_log=False,  # the middleware writes one line per request, with its id
        server_header=False,
        timeout_graceful_shutdown=_GRACE_S,
    )


if __name__ == "__main__":
    main()
