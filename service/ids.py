"""Ids, prefixed as OpenAI's are: `file-…`, `ftjob-…`, `ftevent-…`, `ftckpt_…`."""

import secrets
import string
from typing import Literal

_ALPHABET = string.ascii_letters + string.digits
_LENGTH = 24  # 142 bits: unguessable, and no collision in any database's life

Prefix = Literal[
    "file-", "ftjob-", "ftevent-", "ftckpt_", "proj_", "key_", "adapter_", "worker_", "req_"
]


def new_id(prefix: Prefix) -> str:
    """Return a new random id, `prefix` and 24 letters and digits."""
    return prefix + random_letters(_LENGTH)


def random_letters(n: int) -> str:
    """Return `n` random letters and digits, for names such as `ft:base:org:suffix:AbC1dE2f`."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(n))
