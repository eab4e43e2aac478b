"""Reasons a job can end with that both the worker's parent and its child may give."""

import errno
from typing import Any

JobError = dict[str, Any]
"""{code, message, param} and, where there is one, hint; see `service.queue.finish`."""

DISK_FULL_STATUS = 28
"""A child that cannot even write its result ends with this exit status."""

_FULL = {errno.ENOSPC, errno.EDQUOT}


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error says that there is no room on the disk."""
    return isinstance(error, OSError) and error.errno in _FULL


def disk_full() -> JobError:
    """Return the reason "the disk is full"."""
    return {
        "code": "disk_full",
        "message": "There is no room left on the disk of the machine that worked on this job.",
        "param": None,
        "hint": "Free some space there, then create the job again; earlier checkpoints are kept.",
    }
