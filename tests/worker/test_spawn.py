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


def wait_for_exit(child: Child, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not child.has_exited():
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.02)


def has_loaded(pid: int, library: str) -> bool:
    """Whether it has got so far as to import this; dying with its parent is arranged before that."""
    return library in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")


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
    while not (born and has_loaded(born[0].pid, "tokenizers")):
        time.sleep(0.01)
    lived = not born[0].has_exited()
    may_end.set()
    thread.join()

    wait_for_exit(born[0])

    assert lived
    assert born[0].end() == -signal.SIGKILL


def test_the_end_of_a_child_is_the_end_of_its_group(child: Child) -> None:
    process = psutil.Process(child.pid)
    child.signal(signal.SIGSTOP)
    deadline = time.monotonic() + 90
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
