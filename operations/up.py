"""`nibble up`: the whole service on this machine, until it is told to stop."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from operations.launch import LaunchError, Service
from operations.stopping import Stopped, stop_on_signals
from service.settings import SettingsInvalid, read_settings

_LOOK_EVERY_S = 0.5

DataDir = Annotated[
    Path | None, typer.Option(help="Where the service keeps everything; else NIBBLE_DATA_DIR.")
]


def up(
    data_dir: DataDir = None,
    host: Annotated[
        str | None, typer.Option(help="The address to listen on; 0.0.0.0 for all.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0 takes a free one.")] = None,
    worker: Annotated[bool, typer.Option(help="Start a worker too.")] = True,
) -> None:
    """Start the service here and stay with it: PostgreSQL and Valkey (unless yours are set), API, worker.

    NIBBLE_DATABASE_URL and NIBBLE_REDIS_URL name servers of yours. Ctrl-C stops everything.
    """
    stop_on_signals()
    try:
        settings = read_settings(data_dir=data_dir, host=host, port=port)
        with Service(settings, say=say, worker=worker) as service:
            say(_greeting(service))
            _stay(service)
    except (LaunchError, SettingsInvalid) as error:
        say(f"Error: {error}")
        raise typer.Exit(1) from None
    except Stopped:
        say("Stopped.")


def _stay(service: Service) -> None:
    try:
        while True:
            time.sleep(_LOOK_EVERY_S)
            service.look_after()
    except Stopped:
        say("Stopping …")
        raise


def say(message: str) -> None:
    """Tell the person at the terminal."""
    print(message, file=sys.stderr, flush=True)


def _greeting(service: Service) -> str:
    settings = service.settings
    return (
        f"Nibble is ready.\n"
        f"  API            {service.url}/v1\n"
        f"  documentation  {service.url}/docs\n"
        f"  first API key  in {settings.first_key_file}\n"
        f"  data           {settings.data_dir}\n"
        f"  logs           {settings.data_dir / 'logs'}\n"
        "Ctrl-C stops it."
    )
