"""Memory for moments: what every kind promises, how pieces come and go, and that managed memory is freed once.

On a CPU the paged kinds do all that they do on a GPU but for streams: copies happen at once.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise
from typing import Any

import pytest
import torch

from qlora_core.errors import DeviceError
from qlora_core.optim.cuda_runtime import CudaRuntime
from qlora_core.optim.pinned_memory import PinnedMemory
from qlora_core.optim.state_memory import (
    Bits,
    Moments,
    PlainMemory,
    StateMemory,
    moment_bytes,
    moments_over,
)
from qlora_core.optim.unified_memory import UnifiedMemory
from tests.qlora_core.optim.runtime_stand_in import RuntimeStandIn

CPU = torch.device("cpu")
N = 7 * 1024
# Bytes of a tile of 1024 elements: two float32 each, or two bytes each and two float32 per 256.
TILE_BYTES: dict[Bits, int] = {32: 8192, 8: 2048 + 32}
WIDTHS: tuple[Bits, ...] = (32, 8)
Open = Callable[[int, Bits, torch.device], StateMemory]


def unified(n: int, bits: Bits, device: torch.device) -> UnifiedMemory:
    return UnifiedMemory(n, bits, device, runtime=CudaRuntime(RuntimeStandIn(13000)))


def in_pieces(tiles: int) -> Open:
    def build(n: int, bits: Bits, device: torch.device) -> PinnedMemory:
        # Rounded down to whole tiles.
        return PinnedMemory(n, bits, device, piece_bytes=tiles * TILE_BYTES[bits] + 1)

    return build


KINDS: dict[str, Open] = {
    "plain": PlainMemory,
    "unified": unified,
    "whole": PinnedMemory,
    "one tile": in_pieces(1),
    "two tiles": in_pieces(2),
    "three tiles": in_pieces(3),
}


@pytest.fixture(params=KINDS)
def open_memory(request: pytest.FixtureRequest) -> Open:
    return KINDS[request.param]


def tensors(moments: Moments) -> dict[str, torch.Tensor]:
    return {field.name: getattr(moments, field.name) for field in fields(moments)}


def add_places(memory: StateMemory, times: int = 1) -> None:
    """Add to every element a number that tells which one it is."""
    for place, moments in memory.visit():
        for tensor in tensors(moments).values():
            per_element = (place.stop - place.start) // tensor.numel()
            places = torch.arange(place.start, place.stop, per_element, device=tensor.device)
            tensor.add_((places * times).to(tensor.dtype))


def expected_after(times: int, name: str, bits: Bits) -> torch.Tensor:
    if name.endswith("absmax"):
        return torch.arange(0, N, 256, dtype=torch.float32) * times
    places = torch.arange(N) * times
    return (places % 256).to(torch.uint8) if bits == 8 else places.float()


@pytest.mark.parametrize("bits", WIDTHS)
def test_what_a_visit_changes_is_at_home_afterwards(open_memory: Open, bits: Bits) -> None:
    memory = open_memory(N, bits, CPU)
    assert not any(tensor.any() for tensor in tensors(memory.home).values())

    for _ in range(3):
        memory.prefetch()
        add_places(memory)
    memory.settle()

    for name, tensor in tensors(memory.home).items():
        assert torch.equal(tensor, expected_after(3, name, bits)), name


@pytest.mark.parametrize("bits", WIDTHS)
def test_pieces_are_whole_tiles_and_hold_every_element_once(open_memory: Open, bits: Bits) -> None:
    memory = open_memory(N, bits, CPU)

    places = [place for place, _ in memory.visit()]

    assert places[0].start == 0
    assert places[-1].stop == N
    assert all(a.stop == b.start for a, b in pairwise(places))
    assert all(place.start % 1024 == 0 for place in places)


def test_calls_out_of_order_or_twice_do_nothing(open_memory: Open) -> None:
    memory = open_memory(N, 8, CPU)
    add_places(memory)

    memory.page_out()
    memory.prefetch()
    memory.prefetch()
    memory.page_out()
    memory.page_out()
    memory.settle()
    memory.settle()
    memory.prefetch()
    memory.settle()
    add_places(memory)
    memory.settle()

    for name, tensor in tensors(memory.home).items():
        assert torch.equal(tensor, expected_after(2, name, 8)), name


def test_a_step_that_fails_on_its_way_does_not_shift_the_next_one(open_memory: Open) -> None:
    memory = open_memory(N, 32, CPU)

    def fail() -> None:
        for _ in memory.visit():
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    gc.collect()
    add_places(memory)
    memory.settle()

    assert torch.equal(memory.home.mean, expected_after(1, "mean", 32))


def test_values_put_at_home_are_those_of_the_next_step(open_memory: Open) -> None:
    memory = open_memory(N, 32, CPU)
    memory.prefetch()

    memory.settle()
    memory.home.square.fill_(5)
    seen = torch.cat([moments.square.clone() for _, moments in memory.visit()])

    assert torch.equal(seen, torch.full((N,), 5.0))


def test_plain_memory_is_always_on_the_device() -> None:
    assert PlainMemory(N, 32, CPU).resident_bytes == 8 * N
    assert PlainMemory(N, 8, CPU).resident_bytes == 2 * N + 8 * N // 256


@pytest.mark.parametrize("kind", ["unified", "whole", "two tiles"])
def test_paged_moments_are_on_the_device_from_the_prefetch_to_the_steps_end(kind: str) -> None:
    memory = KINDS[kind](N, 32, CPU)
    pieces = 2 * 2 * TILE_BYTES[32] if kind == "two tiles" else 8 * N
    before = memory.resident_bytes

    memory.prefetch()
    begun = memory.resident_bytes
    during = {memory.resident_bytes for _ in memory.visit()}
    after = memory.resident_bytes

    assert (before, after) == (0, 0)
    assert {begun} == during == {pieces}
    memory.prefetch()
    memory.page_out()
    assert memory.resident_bytes == 0


def test_no_more_than_two_pieces_are_ever_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = in_pieces(1)(N, 8, CPU)
    taken: list[int] = []
    empty = torch.empty

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        taken.append(args[0])
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", counted)

    for _ in range(2):
        add_places(memory)

    assert taken == [TILE_BYTES[8]] * 4


def test_a_prefetch_that_finds_no_room_for_its_second_piece_leaves_nothing_half_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = in_pieces(2)(N, 32, CPU)
    empty = torch.empty
    left = [1]

    def once(*args: Any, **kwargs: Any) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", once)
    with pytest.raises(torch.OutOfMemoryError):
        memory.prefetch()
    monkeypatch.undo()
    resident = memory.resident_bytes
    add_places(memory)
    memory.settle()

    assert resident == 0
    assert torch.equal(memory.home.mean, expected_after(1, "mean", 32))


@pytest.mark.parametrize("bits", WIDTHS)
def test_moments_lie_side_by_side_without_a_gap_or_an_overlap(bits: Bits) -> None:
    n_bytes = moment_bytes(N, bits)
    buffer = torch.zeros(n_bytes, dtype=torch.uint8)

    for tensor in tensors(moments_over(buffer, N, bits)).values():
        tensor.view(torch.uint8).add_(1)

    assert n_bytes == 7 * TILE_BYTES[bits]
    assert torch.equal(buffer, torch.ones_like(buffer))


def moves(library: RuntimeStandIn) -> list[Any]:
    return [call[3] for call in library.calls if call[0] == "prefetch"]


def test_unified_memory_is_moved_whole_once_each_way() -> None:
    library = RuntimeStandIn(13000)
    memory = UnifiedMemory(N, 32, CPU, runtime=CudaRuntime(library))
    (pointer,) = library.live

    for _ in range(2):
        memory.prefetch()
        memory.prefetch()
        add_places(memory)
        memory.page_out()
    memory.settle()

    host, device = (2, 0), (1, 0)
    assert moves(library) == [device, host] * 2
    assert {call[1:3] for call in library.calls if call[0] == "prefetch"} == {(pointer, 8 * N)}
    assert [call for call in library.calls if call[0] == "advise"] == [
        ("advise", pointer, 8 * N, 3, host)
    ]


def test_unified_memory_is_freed_once_and_not_while_a_tensor_of_it_lives() -> None:
    library = RuntimeStandIn(12040)
    memory = UnifiedMemory(N, 8, CPU, runtime=CudaRuntime(library))
    (pointer,) = library.live
    add_places(memory)
    kept = tensors(memory.home)["square_absmax"][3:5]

    del memory
    gc.collect()
    assert list(library.live) == [pointer]
    assert kept.tolist() == [3 * 256, 4 * 256]
    del kept
    gc.collect()

    assert not library.live
    assert [call for call in library.calls if call[0] == "free"] == [("free", pointer)]


def test_an_advice_that_is_refused_leaves_no_memory_behind() -> None:
    library = RuntimeStandIn(13000)
    library.failing = {"advise": 1}

    with pytest.raises(DeviceError, match="cudaMemAdvise failed"):
        UnifiedMemory(N, 8, CPU, runtime=CudaRuntime(library))

    gc.collect()
    assert not library.live


def test_without_concurrent_access_no_managed_memory_is_taken() -> None:
    library = RuntimeStandIn(13000)
    library.concurrent = 0

    with pytest.raises(DeviceError, match="cannot use managed memory at the same time"):
        UnifiedMemory(N, 8, CPU, runtime=CudaRuntime(library))

    assert library.calls == []
