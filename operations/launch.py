"""Everything on one machine: servers, migrations, first key, API, worker, in this order; stopped in the reverse.

`up` stays with it, the demo uses it for its own run. The caller's thread must live as long as the service: its end
ends every process here.
"""

import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import TracebackType
from typing import Self, TypeVar, cast

from pydantic import SecretStr

from operations import migrate
from operations.children import Kept, Program, Running, start_program
from operations.embedded import postgres, processes, valkey
from operations.health import problem_of_api, reachable
from service import db
from service.keys.actions import ensure_first_key
from service.settings import Settings

R = TypeVar("R", bound=Running)

_READY_S = 120.0
_API_GRACE_S = 15.0
_WORKER_MARGIN_S = 15.0
_PORT_ATTEMPTS = 5


class LaunchError(RuntimeError):
    """The service could not start; the message says why and what to do."""


@dataclass
class Service:
    """A service on this machine; use it in a `with`, then call `look_after` every now and then.

    Args:
        settings: what is wanted; URLs that are None are filled with servers of our own.
        say: told in one sentence what happens.
        worker: whether to start a worker too.
    """

    settings: Settings
    say: Callable[[str], None]
    worker: bool = True
    _kept: list[Kept] = field(init=False, default_factory=list[Kept])
    _stack: ExitStack = field(init=False, default_factory=ExitStack)

    def __enter__(self) -> Self:
        """Start everything and return when the API is ready.

        Raises:
            LaunchError: something did not start. What had started is stopped.
        """
        try:
            self._start()
        except (processes.EmbeddedError, migrate.MigrationError) as error:
            self._stack.close()
            raise LaunchError(str(error)) from error
        except OSError as error:
            self._stack.close()
            raise LaunchError(f"{error.strerror or error}: {error.filename or ''}") from error
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop API, worker, Valkey and PostgreSQL, in this order."""
        self._stack.close()

    @property
    def url(self) -> str:
        """Where the API answers, without a path."""
        return f"http://{_bracketed(reachable(self.settings.host))}:{self.settings.port}"

    def look_after(self) -> None:
        """Start again what has ended by itself, and say so."""
        for kept in self._kept:
            kept.look_after()

    def _start(self) -> None:
        if self.worker and find_spec("torch") is None:
            raise LaunchError(
                "a worker needs the engine, which is not installed here: "
                "pip install 'nibble[engine]', or start with --no-worker"
            )
        _check_port(self.settings)
        data_dir = self.settings.data_dir
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = processes.take_lock(data_dir / "lock", f"Nibble already runs over {data_dir}")
        self._stack.callback(os.close, lock)
        self._start_servers()
        self._prepare_database()
        self._start_api()
        processes.note_holder(lock, f"process {os.getpid()}, {self.url}")
        if self.worker:
            self._keep("The worker", lambda: self._program("worker", self._worker_grace_s()))

    def _keep(self, name: str, start: Callable[[], R]) -> R:
        """Start a process that is looked after from now on, and stopped in its turn."""
        kept = Kept(name, start, self.say)
        self._kept.append(kept)
        self._stack.callback(kept.stop)
        return cast("R", kept.running)

    def _start_servers(self) -> None:
        data_dir, settings = self.settings.data_dir, self.settings
        if settings.database_url is None:
            server = self._keep("PostgreSQL", lambda: postgres.start(data_dir))
            settings = settings.model_copy(update={"database_url": SecretStr(server.url)})
        if settings.redis_url is None:
            broker = self._keep("Valkey", lambda: valkey.start(data_dir))
            settings = settings.model_copy(update={"redis_url": SecretStr(broker.url)})
        self.settings = settings

    def _prepare_database(self) -> None:
        url = self.settings.database_url
        if url is None:  # _start_servers fills it
            raise LaunchError("there is no database")
        migrate.upgrade(url.get_secret_value())
        engine = db.connect(self.settings, pool_size=1)
        try:
            with db.transaction(db.sessions(engine)) as session:
                ensure_first_key(session, self.settings)
        finally:
            engine.dispose()

    def _start_api(self) -> None:
        wanted = self.settings.port
        for attempt in range(_PORT_ATTEMPTS):
            port = wanted or free_port(self.settings.host)
            self.settings = self.settings.model_copy(update={"port": port})
            api = self._keep("The API", lambda: self._program("api", _API_GRACE_S))
            if self._wait_until_ready(api):
                return
            end = processes.tail(api.log)
            self._kept.remove(self._kept[-1])
            taken = "address already in use" in end.lower()
            if wanted or not taken or attempt == _PORT_ATTEMPTS - 1:
                raise LaunchError(f"the API did not start. The end of {api.log}:\n{end}")

    def _wait_until_ready(self, api: Program) -> bool:
        """Return whether the API became ready; False when its process ended."""
        deadline = time.monotonic() + _READY_S
        while api.process.poll() is None:
            problem = problem_of_api(self.settings)
            if problem is None:
                return True
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"the API was not ready within {_READY_S:.0f} s: {problem}. "
                    f"The end of {api.log}:\n{processes.tail(api.log)}"
                )
            time.sleep(0.05)
        return False

    def _program(self, module: str, grace_s: float) -> Program:
        log = self.settings.data_dir / "logs" / f"{module}.log"
        return start_program(module, env=self._environment(), log=log, grace_s=grace_s)

    def _worker_grace_s(self) -> float:
        return self.settings.stop_grace_s + _WORKER_MARGIN_S

    def _environment(self) -> dict[str, str]:
        """This process's environment with the settings in force: not in argv, for URLs may carry passwords."""
        variables = dict(os.environ)
        for name in Settings.model_fields:
            value: object = getattr(self.settings, name)
            variable = f"NIBBLE_{name.upper()}"
            variables.pop(variable, None)
            if value is not None:
                revealed = value.get_secret_value() if isinstance(value, SecretStr) else value
                variables[variable] = str(revealed)
        return variables | {"PYTHONUNBUFFERED": "1"}


def free_port(host: str) -> int:
    """Return a port that is free on `host` just now."""
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _check_port(settings: Settings) -> None:
    """Say it before anything starts, where the port is taken or the host is not this machine's.

    Raises:
        LaunchError: one of the two.
    """
    try:
        with socket.socket(_family(settings.host)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the API will
            probe.bind((settings.host, settings.port))
    except OSError as error:
        raise LaunchError(
            f"cannot listen on {settings.host} port {settings.port} ({error.strerror}): "
            "choose another with --port (0 takes a free one) or --host"
        ) from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
