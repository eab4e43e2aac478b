import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from worker.folder import AttemptFolder, write_json
from worker.spawn import Child


def wait_for_exit(child: Child, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not child.has_exited():
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.02)


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child("validate", environment={"MARKED": "yes"}, inherit=[])
    yield child
    child.end()


def test_a_spare_that_is_not_needed_leaves_by_itself(child: Child) -> None:
    child.dismiss()

    assert child.has_exited()


def test_a_child_sees_none_of_our_settings(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIBBLE_DATABASE_URL", "postgresql://secret")
    other = Child("validate", environment={}, inherit=[])

    environment = psutil.Process(other.pid).environ()
    marked = psutil.Process(child.pid).environ()
    other.end()

    assert not [name for name in environment if name.startswith("NIBBLE_")]
    assert marked["MARKED"] == "yes"


def test_a_child_dies_with_the_thread_that_started_it() -> None:
    born: list[Child] = []
    may_end = threading.Event()

    def start() -> None:
        born.append(Child("validate", environment={}, inherit=[]))
        may_end.wait()

    thread = threading.Thread(target=start)
    thread.start()
    while not born:
        time.sleep(0.01)
    time.sleep(2.0)  # it asks for this as its first act
    lived = not born[0].has_exited()
    may_end.set()
    thread.join()

    wait_for_exit(born[0], timeout_s=5)

    assert lived
    assert born[0].end() == -signal.SIGKILL


def test_the_end_of_a_child_is_the_end_of_its_group(child: Child) -> None:
    process = psutil.Process(child.pid)
    child.signal(signal.SIGSTOP)
    deadline = time.monotonic() + 5
    while (stopped := process.status()) != psutil.STATUS_STOPPED and time.monotonic() < deadline:
        time.sleep(0.02)

    status = child.end()

    assert stopped == psutil.STATUS_STOPPED
    assert status == -signal.SIGKILL
    assert not psutil.pid_exists(child.pid)


def test_a_failure_that_nobody_expected_is_told_by_name_and_logged_with_its_traceback(
    child: Child, tmp_path: Path
) -> None:
    folder = AttemptFolder(tmp_path)
    folder.create()
    write_json(folder.spec, {"model": {"nonsense": True}})

    child.begin(folder.path)
    wait_for_exit(child)

    assert child.end() == 0
    result = json.loads(folder.result.read_text(encoding="utf-8"))
    assert result["outcome"] == "failed"
    assert result["error"]["code"] == "internal_error"
    assert "KeyError" in result["error"]["message"]
    assert "Traceback" in folder.log_tail()
