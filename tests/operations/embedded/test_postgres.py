"""The embedded PostgreSQL: it keeps what it said it kept, and is never started twice or left behind."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from sqlalchemy import create_engine, text

from operations.embedded import postgres
from operations.embedded.processes import DataFolderBusy, EmbeddedError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder after its first start and stop, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    postgres.start(folder, settings=postgres.FAST_AND_FORGETFUL).stop()
    return folder


@pytest.fixture
def data_dir(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "data")


def _write(server: postgres.Postgres, n: int) -> None:
    with server.connect() as connection:
        connection.execute("CREATE TABLE kept (n int)")
        for i in range(n):
            connection.execute("INSERT INTO kept VALUES (%s)", [i])


def _count(server: postgres.Postgres) -> int:
    engine = create_engine(server.url)
    with engine.connect() as connection:
        n = connection.execute(text("SELECT count(*) FROM kept")).scalar_one()
    engine.dispose()
    return n


def test_every_commit_survives_a_killed_server(data_dir: Path) -> None:
    server = postgres.start(data_dir)  # with fsync, as `up` starts it
    _write(server, 50)
    server.process.kill()
    server.process.wait()
    server.stop()

    again = postgres.start(data_dir)

    try:
        assert _count(again) == 50
        assert "was not properly shut down" in again.log.read_text()
    finally:
        again.stop()


def test_a_stale_pid_file_with_the_number_of_a_living_process_does_not_stop_it(
    data_dir: Path,
) -> None:
    pid_file = data_dir / "postgres" / "data" / "postmaster.pid"
    pid_file.write_text(f"{os.getppid()}\n{pid_file.parent}\n0\n5432\n\n\n")

    server = postgres.start(data_dir)

    server.stop()
    assert not pid_file.exists()


def test_a_second_start_on_the_same_folder_is_refused_in_one_sentence(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "_ORPHANS_LEAVE_S", 0.5)  # this server will not leave
    server = postgres.start(data_dir)
    try:
        with pytest.raises(DataFolderBusy) as refused:
            postgres.start(data_dir)
    finally:
        server.stop()

    assert str(refused.value) == (
        f"PostgreSQL already runs over {data_dir}/postgres (process {os.getpid()})"
    )


def test_a_server_that_somebody_started_by_hand_is_not_disturbed(data_dir: Path) -> None:
    server = postgres.start(data_dir)
    try:
        (data_dir / "postgres" / "lock").unlink()  # as if it had been started without us
        with pytest.raises(DataFolderBusy, match=f"process {server.process.pid}"):
            postgres.start(data_dir)
    finally:
        server.stop()


def test_stopping_twice_is_no_error_and_the_folder_is_free_again(data_dir: Path) -> None:
    server = postgres.start(data_dir)
    server.stop()
    server.stop()

    postgres.start(data_dir).stop()


def test_an_interrupted_first_start_is_made_anew(data_dir: Path) -> None:
    folder = data_dir / "postgres"
    (folder / "data" / "global" / "pg_control").unlink()
    (folder / "initializing").touch()

    server = postgres.start(data_dir, settings=postgres.FAST_AND_FORGETFUL)

    server.stop()
    assert not (folder / "initializing").exists()


def test_a_damaged_data_folder_is_said_with_the_end_of_the_log(data_dir: Path) -> None:
    (data_dir / "postgres" / "data" / "global" / "pg_control").write_bytes(b"")

    with pytest.raises(EmbeddedError, match=r"(?s)did not start.*pg_control"):
        postgres.start(data_dir)

    assert (data_dir / "postgres" / "data" / "PG_VERSION").exists(), "nobody's data is removed"


def test_a_folder_too_deep_for_a_socket_works(made: Path, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / "data"
    shutil.copytree(made, deep)

    server = postgres.start(deep)

    try:
        _write(server, 1)
        assert _count(server) == 1
        assert server.host.stat().st_mode & 0o777 == 0o700
    finally:
        server.stop()
        server.host.rmdir()


def test_a_folder_with_strange_letters_works(made: Path, tmp_path: Path) -> None:
    strange = tmp_path / "große Daten % & 'x'"
    shutil.copytree(made, strange)

    server = postgres.start(strange)

    try:
        _write(server, 1)
        assert _count(server) == 1
    finally:
        server.stop()


def test_it_ends_when_its_launcher_is_killed(data_dir: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from operations.embedded import postgres\n"
        "print(postgres.start(Path(sys.argv[1])).process.pid, flush=True); time.sleep(60)"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", script, str(data_dir)], stdout=subprocess.PIPE, text=True
    )
    with launcher:
        assert launcher.stdout is not None
        server = psutil.Process(int(launcher.stdout.readline()))
        family = [server, *server.children(recursive=True)]
        launcher.send_signal(signal.SIGKILL)

    _, alive = psutil.wait_procs(family, timeout=60)

    assert alive == []
    postgres.start(data_dir).stop()  # and the folder is free


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_root_without_user_namespaces_runs_it_as_nobody_even_in_a_closed_home(
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    server = postgres.start(home / "data", run_as="nobody", settings=postgres.FAST_AND_FORGETFUL)
    try:
        _write(server, 1)
        assert _count(server) == 1
        assert psutil.Process(server.process.pid).username() == "nobody"
        assert home.stat().st_mode & 0o777 == 0o700
        assert home.stat().st_uid == 0, "only the server's own folder changes hands"
    finally:
        server.stop()
    for run_as in ("nobody", "namespace", "nobody"):  # the same folder, as machines change
        again = postgres.start(home / "data", run_as=run_as, settings=postgres.FAST_AND_FORGETFUL)
        assert _count(again) == 1
        again.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="no setpriv to drop capabilities with")
def test_a_root_that_may_not_pass_closed_folders_is_told_what_to_do(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    script = (
        "import sys; from pathlib import Path; from operations.embedded import postgres\n"
        "postgres.start(Path(sys.argv[1]), run_as='nobody')"
    )

    ended = subprocess.run(
        [
            *("setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"),
            *(sys.executable, "-c", script, str(closed / "data")),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert ended.returncode == 1
    assert "PostgreSQL refuses to run as root" in ended.stderr
    assert "cannot enter" in ended.stderr


def test_parents_of_the_data_folder_keep_their_rights(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)

    server = postgres.start(home / "data", settings=postgres.FAST_AND_FORGETFUL)
    server.stop()

    assert home.stat().st_mode & 0o777 == 0o700
    owners = {path.stat().st_uid for path in (home / "data").rglob("*")}
    assert owners == {os.geteuid()}
