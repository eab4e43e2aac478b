"""The flat optimizer against torch's over tensors of odd sizes, and its state saved and put back."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_core.errors import ConfigError, DtypeError, ResumePointError
from qlora_core.optim.flat_adamw import FlatAdamW

Bits = Literal[8, 32]
SHAPES = ((7, 5), (1,), (256,), (3, 100), (1024,), (33, 65), ())


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.rand(shape, generator=generator) + 0.5) for shape in SHAPES]


def give_gradients(params: list[nn.Parameter], seed: int) -> None:
    """By a backward, whose gradients are ``scale * sin``, of other sizes for each tensor."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        (10.0 ** -(index % 4)) * (param * torch.randn(param.shape, generator=generator)).sum()
        for index, param in enumerate(params)
    ]
    torch.stack(parts).sum().backward()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_in_32_bits_it_is_torchs_adamw(weight_decay: float) -> None:
    ours, theirs = parameters(), parameters()
    flat = FlatAdamW(ours, bits=32, learning_rate=1e-3, weight_decay=weight_decay)
    other = torch.optim.AdamW(theirs, lr=1e-3, weight_decay=weight_decay)

    for step in range(200):
        for params, optimizer in ((ours, flat), (theirs, other)):
            optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
            give_gradients(params, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.detach(), expected.detach(), rtol=1e-6, atol=0)


def test_tensors_of_every_odd_size_are_trained_as_each_would_be_alone() -> None:
    sizes = [*range(1, 520, 2), 1023, 1025, 2049]
    generator = torch.Generator().manual_seed(2)
    widths: tuple[Bits, ...] = (32, 8)
    for bits in widths:
        together = [nn.Parameter(torch.rand(size, generator=generator)) for size in sizes]
        alone = [nn.Parameter(param.detach().clone()) for param in together]
        whole = FlatAdamW(together, bits=bits, learning_rate=0.1, weight_decay=0.1)
        single = [
            FlatAdamW([param], bits=bits, learning_rate=0.1, weight_decay=0.1) for param in alone
        ]

        for _ in range(2):
            for param, other in zip(together, alone, strict=True):
                gradient = torch.randn(param.shape, generator=generator)
                param.grad, other.grad = gradient.clone(), gradient
            for optimizer in (whole, *single):
                optimizer.step()

        for param, other, optimizer in zip(together, alone, single, strict=True):
            assert torch.equal(param, other)
            state = whole.state[param].items()
            assert all(torch.equal(value, optimizer.state[other][name]) for name, value in state)


class Operations(TorchDispatchMode):
    """Counts what torch is told to do."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bits", [32, 8])
def test_a_step_over_many_tensors_is_told_in_as_many_operations_as_over_one(bits: Bits) -> None:
    counted: list[int] = []
    for n in (1, 40):
        params = [nn.Parameter(torch.ones(1024 // n)) for _ in range(n)]
        optimizer = FlatAdamW(params, bits=bits, learning_rate=0.1, copy_dtype=torch.bfloat16)
        torch.stack([param.sum() for param in params]).sum().backward()
        optimizer.step()

        with Operations() as operations:
            optimizer.step(divisor=3.0, loss=torch.ones(()))
            optimizer.zero_grad()
        counted.append(operations.n)

    assert counted[1] <= counted[0]


def test_in_8_bits_it_stays_near_32_bits() -> None:
    start = parameters()
    results: list[list[nn.Parameter]] = []

    widths: tuple[Bits, ...] = (32, 8)
    for bits in widths:
        params = parameters()
        optimizer = FlatAdamW(params, bits=bits, learning_rate=1e-3)
        for step in range(50):
            give_gradients(params, step)
            optimizer.step()
            optimizer.zero_grad()
        results.append(params)

    moved = [(a - b).detach().flatten() for a, b in zip(results[0], start, strict=True)]
    apart = [(a - b).detach().flatten() for a, b in zip(*results, strict=True)]
    assert torch.cat(apart).norm() < 0.1 * torch.cat(moved).norm()


def test_each_tensor_has_blocks_of_its_own() -> None:
    small, large = nn.Parameter(torch.zeros(100)), nn.Parameter(torch.zeros(300))
    optimizer = FlatAdamW([small, large], bits=8, learning_rate=1.0, betas=(0.0, 0.0))

    (small.sum() * 1e-8 + large.sum() * 1e8).backward()
    optimizer.step()

    scales = [optimizer.state[param]["exp_avg_absmax"].tolist() for param in (small, large)]
    assert scales == [pytest.approx([1e-8]), pytest.approx([1e8, 1e8])]
    assert (optimizer.state[small]["exp_avg"] == 255).all()


def test_gradients_of_several_backwards_add_up_in_place() -> None:
    params = parameters()
    optimizer = FlatAdamW(params, bits=32, learning_rate=0.0)
    expected = parameters()
    for seed in (1, 2):
        give_gradients(expected, seed)

    for _ in range(2):
        memory = {
            param.grad.untyped_storage().data_ptr() for param in params if param.grad is not None
        }
        for seed in (1, 2):
            give_gradients(params, seed)

        assert [param.grad.tolist() for param in params if param.grad is not None] == [
            param.grad.tolist() for param in expected if param.grad is not None
        ]
        assert len(memory) == 1
        optimizer.zero_grad(set_to_none=True)


def test_gradients_that_were_put_there_or_taken_away_are_seen() -> None:
    given, taken = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(5))
    optimizer = FlatAdamW([given, taken], bits=8, learning_rate=0.25)
    (given.sum() + taken.sum()).backward()
    given.grad, taken.grad = torch.full((5,), -3.0), None

    optimizer.step()

    assert given.tolist() == pytest.approx([0.25] * 5)
    assert taken.tolist() == [0] * 5
    assert float(optimizer.grad_norm) == pytest.approx(3 * 5**0.5)


def test_clipping_is_folded_in() -> None:
    params, expected = parameters(), parameters()
    optimizer = FlatAdamW(params, bits=32, learning_rate=0.1, eps=1e-2, max_grad_norm=0.5)
    other = torch.optim.AdamW(expected, lr=0.1, eps=1e-2, weight_decay=0)

    for seed in range(3):
        give_gradients(params, seed)
        optimizer.step()
        optimizer.zero_grad()
        give_gradients(expected, seed)
        norm = nn.utils.clip_grad_norm_(expected, 0.5)
        other.step()
        other.zero_grad()
        assert float(optimizer.grad_norm) == pytest.approx(float(norm))

    for mine, theirs in zip(params, expected, strict=True):
        torch.testing.assert_close(mine.detach(), theirs.detach(), rtol=1e-6, atol=1e-7)


def through_memory(state: dict[str, object], _: Path) -> dict[str, object]:
    return copy.deepcopy(state)


def through_a_file(state: dict[str, dict[int, dict[str, torch.Tensor]]], folder: Path) -> object:
    """As resume points do it."""
    flat = {f"{i}.{name}": v for i, each in state["state"].items() for name, v in each.items()}
    save_file(flat, folder / "optimizer.safetensors")
    back: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        back.setdefault(int(index), {})[name] = value
    return {"state": back, "param_groups": state["param_groups"]}


@pytest.mark.parametrize("through", [through_memory, through_a_file])
@pytest.mark.parametrize("bits", [32, 8])
def test_an_optimizer_put_back_goes_on_bit_for_bit(
    bits: Bits, through: Callable[..., dict[str, object]], tmp_path: Path
) -> None:
    unbroken = parameters()
    whole = FlatAdamW(unbroken, bits=bits, learning_rate=0.1)
    for seed in range(3):
        give_gradients(unbroken, seed)
        whole.step()
        whole.zero_grad()
    state = through(whole.state_dict(), tmp_path)
    resumed = [nn.Parameter(param.detach().clone()) for param in unbroken]
    other = FlatAdamW(resumed, bits=bits, learning_rate=0.5)

    other.load_state_dict(state)
    for params, optimizer in ((unbroken, whole), (resumed, other)):
        give_gradients(params, 9)
        optimizer.step()

    assert all(torch.equal(a, b) for a, b in zip(unbroken, resumed, strict=True))
    assert other.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("bits", [32, 8])
def test_what_lies_between_tensors_stays_zero_after_a_state_is_put_back(bits: Bits) -> None:
    whole, resumed = ([nn.Parameter(torch.ones(n)) for n in (100, 300)] for _ in range(2))
    optimizers = [FlatAdamW(params, bits=bits, learning_rate=0.1) for params in (whole, resumed)]
    torch.stack([param.sum() for param in whole]).sum().backward()
    optimizers[0].step()
    optimizers[0].zero_grad()
    with torch.no_grad():
        for mine, param in zip(resumed, whole, strict=True):
            mine.copy_(param)

    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for _ in range(3):
        for params, optimizer in zip((whole, resumed), optimizers, strict=True):
            # So small that a moment out of place beside them would set the block's scale.
            torch.stack([1e-3 * param.sum() for param in params]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    buffers = [params[0].untyped_storage() for params in (whole, resumed)]
    flat = [torch.tensor([], dtype=torch.float32).set_(buffer) for buffer in buffers]
    assert torch.equal(*flat)


def test_an_empty_state_is_the_beginning() -> None:
    params = parameters()
    optimizer = FlatAdamW(params, bits=8, learning_rate=0.1)
    give_gradients(params, 0)
    optimizer.step()

    optimizer.load_state_dict({"state": {}, "param_groups": optimizer.state_dict()["param_groups"]})

    values = [value for state in optimizer.state.values() for value in state.values()]
    assert not any(value.any() for value in values)


@pytest.mark.parametrize("bits", [32, 8])
def test_the_state_of_another_optimizer_is_refused_and_changes_nothing(bits: Bits) -> None:
    params, others = parameters(), parameters()
    optimizer = FlatAdamW(params, bits=bits, learning_rate=0.1)
    for wrong in (
        FlatAdamW(others, bits=8 if bits == 32 else 32, learning_rate=0.1),
        FlatAdamW(others[:-1], bits=bits, learning_rate=0.1),
        FlatAdamW(others[::-1], bits=bits, learning_rate=0.1),
    ):
        give_gradients(others, 0)
        wrong.step()

        with pytest.raises(ResumePointError, match="of another optimizer"):
            optimizer.load_state_dict(wrong.state_dict())

    assert not any(value.any() for state in optimizer.state.values() for value in state.values())


def working_copies(optimizer: FlatAdamW, params: list[nn.Parameter]) -> list[torch.Tensor | None]:
    found = [optimizer.working_copy(param) for param in params]
    return [None if each is None else each.of(param, torch.bfloat16) for each, param in zip(found, params, strict=True)]  # fmt: skip


@pytest.mark.parametrize("bits", [32, 8])
def test_each_parameters_copy_follows_its_steps_and_changes_none(bits: Bits) -> None:
    params, others = parameters(), parameters()
    with_copies = FlatAdamW(params, bits=bits, learning_rate=0.1, copy_dtype=torch.bfloat16)
    without = FlatAdamW(others, bits=bits, learning_rate=0.1)

    for seed in range(3):
        for each, optimizer in ((params, with_copies), (others, without)):
            give_gradients(each, seed)
            optimizer.step()
            optimizer.zero_grad()

        for param, other, copy_ in zip(
            params, others, working_copies(with_copies, params), strict=True
        ):
            assert torch.equal(param, other)
            assert copy_ is not None
            assert torch.equal(copy_, param.detach().bfloat16())
    assert working_copies(without, others) == [None] * len(others)
    assert without.copy_bytes == 0
    assert with_copies.copy_bytes == 2 * 5120  # every tensor's blocks, and a whole tile at the end


@pytest.mark.parametrize("wrong", [1.0, math.nan], ids=["a step", "a step that changes nothing"])
def test_a_parameter_put_back_between_steps_is_in_its_copy_from_the_next_step_on(
    wrong: float,
) -> None:
    params = parameters()
    optimizer = FlatAdamW(params, bits=32, learning_rate=0.1, copy_dtype=torch.bfloat16)
    give_gradients(params, 0)
    optimizer.step()
    with torch.no_grad():
        params[3].copy_(torch.full_like(params[3], 7.0))
    assert working_copies(optimizer, params)[3] is None

    give_gradients(params, 1)
    optimizer.step(loss=torch.tensor(wrong))

    for param, copy_ in zip(params, working_copies(optimizer, params), strict=True):
        assert copy_ is not None
        assert torch.equal(copy_, param.detach().bfloat16())


def test_parameters_that_another_optimizer_takes_over_lose_their_copies() -> None:
    params = parameters()
    first = FlatAdamW(params, bits=32, learning_rate=0.1, copy_dtype=torch.bfloat16)

    FlatAdamW(params, bits=32, learning_rate=0.1)

    assert working_copies(first, params) == [None] * len(params)


def test_parameters_that_have_no_place_are_refused() -> None:
    param = nn.Parameter(torch.zeros(3))
    for params in ([], [param, param]):
        with pytest.raises(ConfigError, match="at least one parameter, and each of them once"):
            FlatAdamW(params, bits=8, learning_rate=0.1)
    with pytest.raises(DtypeError, match=r"parameter 1 must be torch\.float32"):
        FlatAdamW([param, nn.Parameter(torch.zeros(3).half())], bits=8, learning_rate=0.1)
    optimizer = FlatAdamW([param], bits=8, learning_rate=0.1)
    with pytest.raises(ConfigError, match="no other can be added"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})


def test_a_setting_out_of_range_is_refused_before_a_parameter_is_moved() -> None:
    param = nn.Parameter(torch.zeros(3))
    memory = param.data_ptr()

    with pytest.raises(ConfigError, match="learning_rate"):
        FlatAdamW([param], bits=8, learning_rate=-1.0)

    assert param.data_ptr() == memory
