"""Paged optimizers: the bits of those that are not paged, by every kind of memory, and their state put back."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from qlora_core.errors import ResumePointError
from qlora_core.optim import build_optimizer
from qlora_core.optim.cuda_runtime import CudaRuntime
from qlora_core.optim.flat_adamw import FlatAdamW
from qlora_core.optim.paged_memory import open_paged_memory
from qlora_core.optim.pinned_memory import PinnedMemory
from qlora_core.optim.state_memory import Bits, PlainMemory, StateMemory
from qlora_core.optim.unified_memory import UnifiedMemory
from tests.qlora_core.optim.runtime_stand_in import RuntimeStandIn

SHAPES = ((700, 5), (1,), (256,), (3, 1000), (1024,), (33, 65), ())
WIDTHS: tuple[Bits, ...] = (32, 8)


def pinned(n: int, bits: Bits, device: torch.device) -> StateMemory:
    """In pieces of one tile, so that moments of one parameter lie in several."""
    return PinnedMemory(n, bits, device, piece_bytes=1)


def unified(n: int, bits: Bits, device: torch.device) -> StateMemory:
    if device.type == "cuda":
        return UnifiedMemory(n, bits, device)
    return UnifiedMemory(n, bits, device, runtime=CudaRuntime(RuntimeStandIn(13000)))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def parameters(device: str) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter((torch.rand(shape, generator=generator) + 0.5).to(device)) for shape in SHAPES
    ]


def take_steps(optimizer: FlatAdamW, params: list[nn.Parameter], seeds: range) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        gradients = [torch.randn(p.shape, generator=generator).to(p.device) for p in params]
        optimizer.prefetch()
        torch.stack(
            [(p * g).sum() for p, g in zip(params, gradients, strict=True)]
        ).sum().backward()
        optimizer.step(divisor=3.0)
        optimizer.zero_grad()


build = partial(FlatAdamW, learning_rate=0.1, weight_decay=0.1, max_grad_norm=20.0)


@pytest.mark.parametrize("open_memory", [pinned, unified])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_paged_step_gives_the_bits_of_one_that_is_not(
    bits: Bits, open_memory: Any, device: str
) -> None:
    plain, paged = parameters(device), parameters(device)
    optimizers = [
        build(plain, bits=bits),
        build(paged, bits=bits, open_memory=open_memory),
    ]

    for optimizer, params in zip(optimizers, (plain, paged), strict=True):
        take_steps(optimizer, params, range(5))

    assert all(torch.equal(a, b) for a, b in zip(plain, paged, strict=True))
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    for index, of_plain in states[0].items():
        for name, value in of_plain.items():
            assert torch.equal(value.cpu(), states[1][index][name].cpu()), (index, name)
    assert float(optimizers[0].grad_norm) == float(optimizers[1].grad_norm)


@pytest.mark.parametrize("open_memory", [pinned, unified])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_paged_state_put_back_goes_on_bit_for_bit(
    bits: Bits, open_memory: Any, device: str
) -> None:
    unbroken = parameters(device)
    whole = build(unbroken, bits=bits, open_memory=open_memory)
    take_steps(whole, unbroken, range(3))
    state = copy.deepcopy(whole.state_dict())
    resumed = parameters(device)
    other = build(resumed, bits=bits, open_memory=open_memory)
    take_steps(other, resumed, range(7, 9))
    other.prefetch()  # old moments on the device, which must not be those of the next step

    with torch.no_grad():
        for mine, param in zip(resumed, unbroken, strict=True):
            mine.copy_(param)
    other.load_state_dict(state)
    for params, optimizer in ((unbroken, whole), (resumed, other)):
        take_steps(optimizer, params, range(3, 5))

    assert all(torch.equal(a, b) for a, b in zip(unbroken, resumed, strict=True))


@pytest.mark.parametrize("open_memory", [pinned, unified])
def test_moments_are_on_the_device_for_the_step_only(open_memory: Any) -> None:
    params = parameters("cpu")
    optimizer = build(params, bits=8, open_memory=open_memory)

    resident = [optimizer.resident_bytes]
    take_steps(optimizer, params, range(2))
    resident.append(optimizer.resident_bytes)
    optimizer.prefetch()
    brought = optimizer.resident_bytes
    optimizer.zero_grad()
    resident.append(optimizer.resident_bytes)

    assert resident == [0, 0, 0]
    assert brought > 0
    assert optimizer.paged


@pytest.mark.parametrize("open_memory", [pinned, unified])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_gradient_that_is_not_finite_changes_no_paged_moment(
    bits: Bits, open_memory: Any
) -> None:
    params = parameters("cpu")
    optimizer = build(params, bits=bits, open_memory=open_memory)
    take_steps(optimizer, params, range(2))
    before = copy.deepcopy(optimizer.state_dict()["state"])
    values = [param.detach().clone() for param in params]

    torch.stack([param.sum() for param in params]).sum().mul(torch.nan).backward()
    optimizer.step()

    assert all(torch.equal(a, b) for a, b in zip(params, values, strict=True))
    for index, moments in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[index][name]) for name, value in moments.items())


def test_the_state_of_another_optimizer_is_refused_by_a_paged_one_too() -> None:
    params = parameters("cpu")
    other = build(params, bits=8)

    with pytest.raises(ResumePointError, match="of another optimizer"):
        build(params, bits=32, open_memory=pinned).load_state_dict(other.state_dict())


def test_on_a_cpu_a_paged_optimizer_has_plain_memory() -> None:
    memory = open_paged_memory(1024, 8, torch.device("cpu"))

    assert isinstance(memory, PlainMemory)
    assert memory.notice is None


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_on_a_cpu_the_paged_names_give_the_same_bits(name: str) -> None:
    results: list[list[nn.Parameter]] = []
    for each in (name, f"paged_{name}"):
        params = parameters("cpu")
        optimizer = build_optimizer(each, params, learning_rate=0.1)
        take_steps(optimizer, params, range(3))
        results.append(params)
        assert not optimizer.paged

    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_where_unified_memory_cannot_be_had_pinned_memory_is_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A GPU by name only: what pinned memory does with it is tried on a CPU above.
    taken: dict[str, Any] = {}

    def record(n: int, bits: Bits, device: torch.device, *, notice: str) -> StateMemory:
        taken.update(n=n, bits=bits, device=device, notice=notice)
        return PinnedMemory(n, bits, torch.device("cpu"), notice=notice)

    monkeypatch.setattr("qlora_core.optim.paged_memory.PinnedMemory", record)
    monkeypatch.setattr(
        "qlora_core.optim.unified_memory.loaded_runtime", lambda: CudaRuntime(without_access())
    )

    optimizer = build(
        parameters("cpu"),
        bits=8,
        open_memory=lambda n, bits, _: open_paged_memory(n, bits, torch.device("cuda", 1)),
    )

    assert taken["device"] == torch.device("cuda", 1)
    assert (
        optimizer.notice
        == taken["notice"]
        == (
            "Optimizer state is paged through pinned memory, not unified memory: CPU and GPU cannot use "
            "managed memory at the same time here."
        )
    )


def without_access() -> RuntimeStandIn:
    library = RuntimeStandIn(13000)
    library.concurrent = 0
    return library


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_on_a_gpu_the_paged_names_are_paged_and_give_the_same_bits(name: str) -> None:
    results: list[list[nn.Parameter]] = []
    for each in (name.removeprefix("paged_"), name):
        params = parameters("cuda")
        optimizer = build_optimizer(each, params, learning_rate=0.1)
        take_steps(optimizer, params, range(3))
        results.append(params)
        assert optimizer.paged == (each == name)
        assert (optimizer.resident_bytes == 0) == optimizer.paged

    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
