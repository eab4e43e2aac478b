"""The tokens of a dataset, four bytes each: in memory while they are few, in an unnamed file once they are many.

The file has no name, so nothing is left of it however the process ends. It is read, not mapped: pages that a
mapping has touched would count as this process's memory, up to the size of the file.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from array import array
from pathlib import Path

import torch
from torch import Tensor

_TOKEN_BYTES = 4
IN_MEMORY_BYTES = 64 << 20


class TokenStore:
    """Tokens, appended at the end and read from anywhere.

    Args:
        folder: where the file is made once one is needed; the system's for temporary files if not given.
        in_memory_bytes: how much is kept in memory before there is a file.

    Attributes:
        largest_id: of all tokens, -1 while there are none.
    """

    def __init__(
        self, *, folder: Path | None = None, in_memory_bytes: int = IN_MEMORY_BYTES
    ) -> None:
        # It moves what it holds into an unnamed file of its own accord.
        self._file = tempfile.SpooledTemporaryFile(in_memory_bytes, dir=folder)  # noqa: SIM115 - for this one's life
        weakref.finalize(self, self._file.close)
        self.largest_id = -1

    def append(self, tokens: array[int]) -> None:
        """Add tokens: int32, the complement of the id (``~id``, below 0) where a token is trained."""
        self._file.seek(0, os.SEEK_END)
        self._file.write(tokens.tobytes())
        if tokens:
            most, least = max(tokens), min(tokens)
            self.largest_id = max(self.largest_id, most, ~least)

    def read(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Return ids int32 [count] and the loss mask bool [count] of the tokens from number ``start`` on."""
        self._file.seek(start * _TOKEN_BYTES)
        kept = torch.frombuffer(bytearray(self._file.read(count * _TOKEN_BYTES)), dtype=torch.int32)
        trained = kept < 0
        return torch.where(trained, ~kept, kept), trained
