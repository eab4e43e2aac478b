import threading
import time
from pathlib import Path

from worker.child.lease import wait_until_ours
from worker.folder import AttemptFolder
from worker.lease import boottime


def test_past_its_end_the_child_waits_until_the_lease_is_prolonged(tmp_path: Path) -> None:
    folder = AttemptFolder(tmp_path)
    folder.write_deadline(boottime() - 1)
    child = threading.Thread(target=wait_until_ours, args=(folder,))
    child.start()
    time.sleep(0.5)
    waited = child.is_alive()

    folder.write_deadline(boottime() + 60)
    child.join(timeout=60)

    assert waited
    assert not child.is_alive()


def test_within_the_lease_it_does_not_wait(tmp_path: Path) -> None:
    folder = AttemptFolder(tmp_path)
    folder.write_deadline(boottime() + 60)
    started = time.monotonic()

    wait_until_ours(folder)

    assert time.monotonic() - started < 10  # it would have waited a minute
