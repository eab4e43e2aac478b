"""Paged moments on a GPU: values kept both ways, and the card's own free memory before and after a page-out."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

import pytest
import torch

from qlora_core.optim.pinned_memory import PinnedMemory
from qlora_core.optim.state_memory import moment_bytes
from qlora_core.optim.unified_memory import UnifiedMemory
from tests.qlora_core.optim.test_state_memory import (
    WIDTHS,
    Bits,
    N,
    Open,
    add_places,
    expected_after,
    in_pieces,
    tensors,
)

pytestmark = pytest.mark.gpu


@pytest.fixture
def allocated_on_gpu() -> Callable[[], int]:
    """Tells how much less memory the whole card has free than at first."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]

    def taken() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return free - torch.cuda.mem_get_info()[0]

    return taken


# 268 MB in 8 bits: well below what any card has free, and far more than what else may change meanwhile.
LARGE = 128 * 1024**2
SLACK = 64 * 1024**2


@pytest.mark.parametrize(
    "kind", [UnifiedMemory, partial(PinnedMemory, piece_bytes=2**30)], ids=["unified", "pinned"]
)
def test_on_a_gpu_its_memory_falls_by_the_states_size_after_a_page_out(
    kind: Open, allocated_on_gpu: Callable[[], int]
) -> None:
    n_bytes = moment_bytes(LARGE, 8)
    memory = kind(LARGE, 8, torch.device("cuda"))
    tensors(memory.home)["mean"][::1024] = 7

    at_first = allocated_on_gpu()
    memory.prefetch()
    there = allocated_on_gpu()
    resident = memory.resident_bytes
    for _, moments in memory.visit():
        tensors(moments)["square"][::1024] = tensors(moments)["mean"][::1024] + 1
    memory.settle()
    after = allocated_on_gpu()

    assert at_first < SLACK
    assert resident >= n_bytes
    assert n_bytes - SLACK < there < resident + SLACK
    assert there - after > n_bytes - SLACK
    assert memory.resident_bytes == 0
    assert (tensors(memory.home)["square"][::1024] == 8).all()
    del memory
    gc.collect()
    assert allocated_on_gpu() < SLACK


@pytest.mark.parametrize(
    "kind",
    [UnifiedMemory, in_pieces(1), in_pieces(3), PinnedMemory],
    ids=["unified", "one tile", "three tiles", "whole"],
)
@pytest.mark.parametrize("bits", WIDTHS)
def test_on_a_gpu_values_are_kept_both_ways(kind: Open, bits: Bits) -> None:
    memory = kind(N, bits, torch.device("cuda"))

    for _ in range(5):
        memory.prefetch()
        add_places(memory)
    memory.settle()

    for name, tensor in tensors(memory.home).items():
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, expected_after(5, name, bits)), name
