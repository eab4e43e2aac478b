"""Tokens come back as they were put in, from memory and from a file that has no name."""

from __future__ import annotations

import gc
from array import array
from pathlib import Path

import pytest
import torch

from qlora_core.data.tokens import TokenStore


@pytest.mark.parametrize("in_memory_bytes", [1 << 20, 16], ids=["memory", "file"])
def test_tokens_come_back_with_their_mask(in_memory_bytes: int, tmp_path: Path) -> None:
    store = TokenStore(folder=tmp_path, in_memory_bytes=in_memory_bytes)
    store.append(array("i", [7, ~8, 0, ~0, 2**31 - 1]))
    first = store.read(1, 3)
    store.append(array("i", [~5, 6]))

    ids, trained = store.read(2, 5)

    assert ids.tolist() == [0, 0, 2**31 - 1, 5, 6]
    assert trained.tolist() == [False, True, False, True, False]
    assert (ids.dtype, trained.dtype) == (torch.int32, torch.bool)
    assert first[0].tolist() == [8, 0, 0]
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_closed_with_its_store(tmp_path: Path) -> None:
    store = TokenStore(folder=tmp_path, in_memory_bytes=1)
    store.append(array("i", range(1000)))
    open_files = len(list(Path("/proc/self/fd").iterdir()))

    del store
    gc.collect()

    assert len(list(Path("/proc/self/fd").iterdir())) < open_files
