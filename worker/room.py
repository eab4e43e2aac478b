"""What has to be free on the disk before something is begun there. Parent and child ask it."""

import shutil
from pathlib import Path

from worker.reasons import NoRoom

ATTEMPT_BYTES = 1 << 20
"""What any attempt writes of itself: its spec, events and log."""


def check_room(folder: Path, *, needed_bytes: int, kept_free_bytes: int) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        folder: on that disk.
        needed_bytes: what will be written at most.
        kept_free_bytes: what others on this disk, the database among them, have to be left.

    Raises:
        NoRoom: there is less.
    """
    free = shutil.disk_usage(folder).free
    if free - needed_bytes < kept_free_bytes:
        raise NoRoom(
            f"The job needs up to {needed_bytes:,} bytes of the disk of the machine that worked on it, which has"
            f" {free:,} free and keeps {kept_free_bytes:,} of them back."
        )
