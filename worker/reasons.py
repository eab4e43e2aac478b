"""Reasons a job can end with that both the worker's parent and its child may give."""

import errno
import os
import re
from typing import Any

JobError = dict[str, Any]
"""{code, message, param} and, where there is one, hint; see `service.queue.finish`."""


class NoRoom(OSError):
    """There is less room on a disk than what is to be written will take; nothing of it was written."""

    def __init__(self, message: str) -> None:
        """`message` is what the user reads: how much is needed, and how much is free."""
        super().__init__(errno.ENOSPC, message)


DISK_FULL_STATUS = 28
"""A child that cannot even write its result ends with this exit status."""

OUT_OF_MEMORY_HINT = "Use a smaller batch_size, context_length or lora_r, or a smaller base model."

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


def disk_full(error: BaseException | None = None) -> JobError:
    """Return the reason "the disk is full", in the words of `error` where that is a `NoRoom`."""
    message = "There is no room left on the disk of the machine that worked on this job."
    return {
        "code": "disk_full",
        "message": str(error.strerror) if isinstance(error, NoRoom) else message,
        "param": None,
        "hint": "Free some space there, then create the job again; earlier checkpoints are kept.",
    }


def out_of_memory() -> JobError:
    """Return the reason "memory has ended", where nothing is known of where it went."""
    return {
        "code": "out_of_memory",
        "message": "There was not enough memory to go on.",
        "param": None,
        "hint": OUT_OF_MEMORY_HINT,
    }
