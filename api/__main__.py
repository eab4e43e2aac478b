"""`python -m api`: serve on the configured host and port until told to stop."""

import contextlib
import signal
import socket
import sys

import uvicorn

from api.main import create_app
from service import logging
from service.db import DatabaseUrlMissing
from service.events.feed import Feed
from service.models.catalog import CatalogError
from service.queue.broker import RedisUrlMissing
from service.settings import read_settings
from service.storage import StorageUrlInvalid

_GRACE_S = 5
"""How long open downloads may hold up the end; clients resume them."""
_NOT_STARTED = 3


def main() -> None:
    """Read the settings, make the application, serve it."""
    try:
        settings = read_settings()
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
    # uvicorn ends well on SIGTERM and then sends it to itself again; to end as told is no failure.
    signal.signal(signal.SIGTERM, lambda _signal, _frame: sys.exit(0))
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,  # ours
        access_log=False,  # the middleware writes one line per request, with its id
        server_header=False,
        timeout_graceful_shutdown=_GRACE_S,
    )
    server = _Server(config, app.state.nibble.feed)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(_NOT_STARTED)


class _Server(uvicorn.Server):
    """Ends event streams before it waits for connections: they would last as long as their jobs."""

    def __init__(self, config: uvicorn.Config, feed: Feed) -> None:
        super().__init__(config)
        self._feed = feed

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop serving."""
        await self._feed.close()
        await super().shutdown(sockets)


if __name__ == "__main__":
    main()
