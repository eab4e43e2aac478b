"""What is held exactly as long as a worker, or a child of it, lives: locks on open files.

A child inherits the open file, so the kernel frees the lock only when the last of them is dead. That makes "is it dead?"
a question with an answer, which a pid never gives.
"""

import fcntl
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

_SUFFIX = ".lock"


@dataclass(frozen=True)
class Lock:
    """A held lock; `fd` is handed to children. Closing it here frees it once they are gone."""

    path: Path
    fd: int

    def release(self) -> None:
        """Let go (children may still hold it)."""
        os.close(self.fd)


def try_lock(path: Path) -> Lock | None:
    """Take the lock on `path` (made if missing); None: somebody holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return Lock(path, fd)


class Incarnations:
    """The workers of one host that use one data folder: each holds a lock named after its id."""

    def __init__(self, data_dir: Path, host: str) -> None:
        self._folder = data_dir / "workers" / _safe(host)

    def take(self, worker_id: str) -> Lock:
        """Hold the lock of a new worker."""
        lock = try_lock(self._folder / f"{worker_id}{_SUFFIX}")
        if lock is None:  # the id is new and random
            raise RuntimeError(f"the lock of {worker_id} is held already")
        return lock

    def dead(self) -> list[Lock]:
        """Take and return the locks that nobody holds: these workers and all their children are dead.

        Call `bury` on each when what it left has been released; until then nobody else sees it as dead.
        """
        found: list[Lock] = []
        if not self._folder.is_dir():
            return found
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            lock = try_lock(path)
            if lock is not None:
                found.append(lock)
        return found

    @staticmethod
    def worker_id(lock: Lock) -> str:
        """Return whose lock it is."""
        return lock.path.name.removesuffix(_SUFFIX)

    @staticmethod
    def bury(lock: Lock) -> None:
        """Forget a dead worker."""
        lock.path.unlink(missing_ok=True)
        lock.release()


def gpu_lock_path(uuid: str) -> Path:
    """Return the machine-wide place of a GPU's lock: two services on a machine must not share a GPU unawares.

    Per user, since one user cannot open another's files in a shared folder.
    """
    shared = Path("/run/lock")
    folder = shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    return folder / f"nibble-{os.getuid()}-gpu-{_safe(uuid)}{_SUFFIX}"


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name) or "_"
