"""Real servers for every test that asks: one PostgreSQL and one Valkey per pytest process, started at first use.

Each test's database is a copy of a template that the migrations built. What must be set before anything imports
triton is set here, at import.
"""

import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from pydantic import SecretStr
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

HAS_GPU = Path("/dev/nvidia0").exists()

if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# torch's threads spin while they wait for one another; on cores shared with other tests that costs ten times the work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
for _name in [name for name in os.environ if name.startswith("NIBBLE_")]:
    del os.environ[_name]  # a developer's own settings change no test

# Every process that a test starts inherits this mark, also one whose parent has died.
_MARK = secrets.token_hex(8)
os.environ["PYTEST_NIBBLE_SESSION"] = _MARK

from operations import migrate  # noqa: E402  (after the environment is ready)
from operations.embedded import postgres, valkey  # noqa: E402
from service import db  # noqa: E402
from service.settings import Settings  # noqa: E402

_TEMPLATE = "nibble_template"


def pytest_configure() -> None:
    """Let Ctrl-C mean Ctrl-C: a shell starts what it runs in the background with SIGINT ignored, and children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no GPU, even when they are asked for."""
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


@pytest.fixture(scope="session", autouse=True)
def _no_process_left_behind() -> Iterator[None]:
    """Fail the session's last test when a process that any test started still lives."""
    yield
    left = _marked_processes()
    _, alive = psutil.wait_procs(left, timeout=60)
    told = [_describe(process) for process in alive]
    for process in alive:
        process.kill()
    assert not told, "processes left behind by the tests: " + "; ".join(told)


def _marked_processes() -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            if (
                f"PYTEST_NIBBLE_SESSION={_MARK}".encode() in environment
                and process.pid != os.getpid()
            ):
                found.append(process)
        except OSError:  # gone, or somebody else's
            continue
    return found


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:200]}"
    except psutil.Error:
        return str(process.pid)


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[postgres.Postgres]:
    """The PostgreSQL of this pytest process; it forgets on a power cut and is fast for it."""
    server = postgres.start(
        tmp_path_factory.mktemp("servers"), settings=postgres.FAST_AND_FORGETFUL
    )
    yield server
    server.stop()


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[valkey.Valkey]:
    """The Valkey of this pytest process; use `redis_url`, which is empty at each test's start."""
    server = valkey.start(tmp_path_factory.mktemp("servers"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def _template(postgres_server: postgres.Postgres) -> str:
    """A database that the migrations built from empty, never connected to again."""
    with postgres_server.connect() as connection:
        connection.execute(f"CREATE DATABASE {_TEMPLATE}")
    migrate.upgrade(postgres_server.url_of(_TEMPLATE))
    return _TEMPLATE


@pytest.fixture
def empty_database_url(postgres_server: postgres.Postgres) -> Iterator[str]:
    """The URL of a new database without any table."""
    yield from _database(postgres_server, template="template0")


@pytest.fixture
def database_url(postgres_server: postgres.Postgres, _template: str) -> Iterator[str]:
    """The URL of this test's own database, at the newest schema, with the default project in it."""
    yield from _database(postgres_server, template=_template)


def _database(server: postgres.Postgres, *, template: str) -> Iterator[str]:
    name = f"test_{secrets.token_hex(8)}"
    with server.connect() as connection:
        connection.execute(
            f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy".encode()
        )
    yield server.url_of(name)
    with server.connect() as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def redis_url(valkey_server: valkey.Valkey) -> str:
    """The URL of an empty Valkey."""
    with valkey_server.client() as client:
        client.flushall()
    return valkey_server.url


@pytest.fixture
def settings(tmp_path: Path, database_url: str, redis_url: str) -> Settings:
    """Settings over this test's own folder, database and Valkey; leases are short, nothing polls for long."""
    return Settings(
        _env_file=None,  # pyright: ignore[reportCallIssue]  (pydantic-settings' own argument)
        data_dir=tmp_path / "data",
        database_url=SecretStr(database_url),
        redis_url=SecretStr(redis_url),
        port=0,
        min_free_bytes=0,
        lease_s=4.0,
        renew_s=0.5,
        poll_s=1.0,
        reap_s=0.5,
        stop_grace_s=5.0,
    )


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    """An engine over this test's database."""
    engine = db.connect(settings)
    yield engine
    engine.dispose()


@pytest.fixture
def sessions(engine: Engine) -> sessionmaker[Session]:
    """What every edge makes its sessions from."""
    return db.sessions(engine)


@pytest.fixture
def session(sessions: sessionmaker[Session]) -> Iterator[Session]:
    """One open session; what a test does not commit is rolled back."""
    with sessions() as session:
        yield session


@pytest.fixture
def device() -> str:
    """Where kernels run: the GPU where there is one, else Triton's interpreter on the CPU."""
    return "cuda" if HAS_GPU else "cpu"
