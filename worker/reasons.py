"""Reasons a job can end with that both the worker's parent and its child may give."""

import errno
import os
import re
from typing import Any

JobError = dict[str, Any]
"""{code, message, param} and, where there is one, hint; see `service.queue.finish`."""

DISK_FULL_STATUS = 28
"""A child that cannot even write its result ends with this exit status."""

_FULL = {errno.ENOSPC, errno.EDQUOT}
_SAID = re.compile(
    "|".join(rf"\(os error {code}\)|{re.escape(os.strerror(code))}" for code in sorted(_FULL))
)
"""How libraries say it that raise errors of their own: safetensors and tokenizers (Rust), torch (C++)."""


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error, or one that it came from, says that there is no room on the disk."""
    seen: list[BaseException] = []
    here: BaseException | None = error
    while here is not None and here not in seen:
        if isinstance(here, OSError):
            if here.errno in _FULL:
                return True
        elif _SAID.search(str(here)):
            return True
        seen.append(here)
        here = here.__cause__ or here.__context__
    return False


def told(error: Exception) -> str:
    """Return what a user reads of an error: of one of the system's without the path on this machine."""
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror
    return str(error)


def disk_full() -> JobError:
    """Return the reason "the disk is full"."""
    return {
        "code": "disk_full",
        "message": "There is no room left on the disk of the machine that worked on this job.",
        "param": None,
        "hint": "Free some space there, then create the job again; earlier checkpoints are kept.",
    }
