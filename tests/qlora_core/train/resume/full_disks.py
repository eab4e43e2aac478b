"""Writes resume points to a disk that is full at a random byte, again and again, and looks what a run would go on from.

``python -m tests.qlora_core.train.resume.full_disks FOLDER SEED COUNT`` mounts a small file system over the folder, for itself alone;
where that is not allowed it ends with 77. It prints a line of JSON for each: the error's number, the names that were left,
the step that a run takes then, and the step that it takes after there was room again and a point was written.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import sys
from pathlib import Path

from tests.qlora_core.train.resume.tiny_points import TinyRun, taken

NOT_ALLOWED = 77
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_DISK_BYTES = 2 * 2**20


def main() -> int:
    """Fill the disk as often as the arguments say."""
    disk, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    if not mounted(disk):
        return NOT_ALLOWED
    drawn = random.Random(seed)
    run, folder = TinyRun(), disk / "resume"
    run.write(folder, 1)
    point_bytes = sum(path.stat().st_size for path in (folder / "step-1").iterdir())
    for step in range(2, count + 2):
        fill_but_for(disk, drawn.randrange(point_bytes))
        number = None
        try:
            run.write(folder, step)
        except OSError as error:
            number = error.errno
        found = {
            "errno": number,
            "left": sorted(path.name for path in folder.iterdir()),
            "taken": taken(folder)[0],
        }
        (disk / "ballast").unlink()
        run.write(folder, step)
        sys.stdout.write(json.dumps(found | {"taken_then": taken(folder)[0]}) + "\n")
    return 0


def mounted(disk: Path) -> bool:
    """Put a small file system of this process's own over a folder; false where the machine does not let us."""
    libc = ctypes.CDLL(None, use_errno=True)
    as_root = 0 if os.geteuid() == 0 else _CLONE_NEWUSER
    if libc.unshare(_CLONE_NEWNS | as_root) != 0:
        return False
    # Without this the machine's own mounts would get a copy.
    if libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) != 0:
        return False
    return libc.mount(b"tmpfs", bytes(disk), b"tmpfs", 0, b"size=%d" % _DISK_BYTES) == 0


def fill_but_for(disk: Path, nbytes: int) -> None:
    """Leave so many bytes, up to a page."""
    room = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(max(0, room.f_bavail * room.f_frsize - nbytes)))


if __name__ == "__main__":
    sys.exit(main())
