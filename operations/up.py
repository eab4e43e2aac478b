"""`nibble up`: the whole service on this machine, until it is told to stop."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from nibble import output
from nibble.commands.options import Json
from nibble.endings import Ending, ExitCode, exit_with
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
    json: Json = False,
) -> None:
    """Start the service here and stay with it: PostgreSQL and Valkey (unless yours are set), API, worker.

    NIBBLE_DATABASE_URL and NIBBLE_REDIS_URL name servers of yours. Ctrl-C stops everything. With --json where it is and
    where its first key is kept is one document on stdout, once it is ready.
    """
    stop_on_signals()
    try:
        settings = read_settings(data_dir=data_dir, host=host, port=port)
        with Service(settings, say=say, worker=worker) as service:
            if json:
                output.print_json({name: at for name, _, at in _places(service)})
            say(_greeting(service))
            _stay(service)
    except (LaunchError, SettingsInvalid) as error:
        exit_with(Ending(ExitCode.FAILED, str(error)))
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
    lines = [f"  {label:<18}{at}" for _, label, at in _places(service)]
    return "\n".join(["Nibble is ready.", *lines, "Ctrl-C stops it."])


def _places(service: Service) -> list[tuple[str, str, str]]:
    """What people and scripts look for: its name for either, and where it is."""
    settings = service.settings
    return [
        ("base_url", "API", f"{service.url}/v1"),
        ("documentation", "documentation", f"{service.url}/docs"),
        ("first_api_key_file", "first API key in", str(settings.first_key_file)),
        ("data_dir", "data", str(settings.data_dir)),
        ("logs_dir", "logs", str(settings.data_dir / "logs")),
    ]
