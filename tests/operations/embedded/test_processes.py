"""Children tied to their parent: locks, logs, stopping."""

import os
import signal
import time
from pathlib import Path

import pytest

from operations.embedded import processes


def test_output_goes_to_a_log_that_only_its_owner_reads(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "echo.log"

    status = processes.run_tied(["/bin/echo", "hello", "there"], log=log, timeout_s=60)

    assert status == 0
    assert log.read_text() == "hello there\n"
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_program_that_is_not_there_says_so_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"

    status = processes.run_tied(["/no/such/program"], log=log, timeout_s=60)

    assert status == 1
    assert log.read_text() == (
        "cannot start /no/such/program: [Errno 2] No such file or directory\n"
    )


def test_the_child_sees_exactly_the_environment_it_is_given(tmp_path: Path) -> None:
    log = tmp_path / "log"

    child = processes.start_tied(["/usr/bin/env"], log=log, env={"ONLY": "this"})
    child.wait(60)

    assert "ONLY=this" in log.read_text().splitlines()
    assert "PATH" not in log.read_text()


def test_a_child_that_does_not_listen_is_killed_and_that_is_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    deaf = processes.start_tied(
        ["/bin/sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 0.1; done"], log=log
    )
    while "deaf" not in log.read_text():
        time.sleep(0.01)

    by_itself = processes.stop(deaf, signal.SIGTERM, timeout_s=0.3)

    assert not by_itself
    assert deaf.returncode == -signal.SIGKILL


def test_a_command_past_its_time_is_killed(tmp_path: Path) -> None:
    status = processes.run_tied(["/bin/sleep", "60"], log=tmp_path / "log", timeout_s=0.3)

    assert status == -signal.SIGKILL  # it would have ended well after a minute


def test_a_lock_names_who_holds_it_and_is_free_when_closed(tmp_path: Path) -> None:
    held = processes.take_lock(tmp_path / "lock", "The folder is in use")

    with pytest.raises(processes.DataFolderBusy) as busy:
        processes.take_lock(tmp_path / "lock", "The folder is in use")

    assert str(busy.value) == f"The folder is in use (process {os.getpid()})"
    os.close(held)
    os.close(processes.take_lock(tmp_path / "lock", "The folder is in use"))


def test_a_child_that_inherits_the_lock_keeps_it_after_its_parent_let_go(tmp_path: Path) -> None:
    lock = processes.take_lock(tmp_path / "lock", "in use")
    child = processes.start_tied(["/bin/sleep", "60"], log=tmp_path / "log", keep_open=[lock])
    os.close(lock)

    with pytest.raises(processes.DataFolderBusy):
        processes.take_lock(tmp_path / "lock", "in use")

    processes.stop(child, signal.SIGTERM, timeout_s=5)
    os.close(processes.take_lock(tmp_path / "lock", "in use"))


def test_the_tail_of_a_log_is_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"line {i}\n" for i in range(2000)))

    assert processes.tail(log, lines=2) == "line 1998\nline 1999"
    assert processes.tail(tmp_path / "none") == ""
