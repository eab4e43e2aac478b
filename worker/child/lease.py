"""The child's side of the lease: past its end it waits, so that two copies of a job never run at once.

The parent normally stops it before that; this holds when the parent itself is frozen. Should the parent die, so does the
child (PDEATHSIG); should the job be given away, the parent kills it when it comes back.
"""

import time

from worker.folder import AttemptFolder

_LOOK_EVERY_S = 0.2


def wait_until_ours(folder: AttemptFolder) -> None:
    """Return at once while the lease holds; else when the parent has prolonged it."""
    while (until := folder.read_deadline()) is not None:
        if time.clock_gettime(time.CLOCK_BOOTTIME) < until:
            return
        time.sleep(_LOOK_EVERY_S)
