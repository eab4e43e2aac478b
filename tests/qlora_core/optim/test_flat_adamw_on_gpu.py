"""A step on a GPU: one launch of its kernel over all tensors, nothing waited for, the values of a CPU."""

from typing import Literal

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from qlora_core.optim.flat_adamw import FlatAdamW

pytestmark = pytest.mark.gpu
Bits = Literal[8, 32]


def parameters(n: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(n)
    return [nn.Parameter(torch.randn(100 + i, generator=generator).cuda()) for i in range(n)]


def give_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        assert param.grad is not None
        param.grad.copy_(torch.randn(param.shape, generator=generator))


@pytest.mark.parametrize("bits", [32, 8])
def test_a_step_is_one_launch_of_its_kernel_and_as_many_others_for_many_tensors_as_for_one(
    bits: Bits,
) -> None:
    launched: list[list[str]] = []
    for n in (1, 100):
        params = parameters(n)
        optimizer = FlatAdamW(params, bits=bits, learning_rate=0.1, copy_dtype=torch.bfloat16)
        give_gradients(params, 1)
        optimizer.step(divisor=3.0, loss=torch.ones((), device="cuda"))
        torch.cuda.synchronize()

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            optimizer.step(divisor=3.0, loss=torch.ones((), device="cuda"))
            torch.cuda.synchronize()
        launched.append([event.name for event in profiler.events()])  # pyright: ignore[reportOptionalIterable]

    for names in launched:
        assert sum(name.startswith(f"adamw_{bits}_kernel") for name in names) == 1
    # The norm of more elements may take a second pass.
    assert len(launched[1]) <= len(launched[0]) + 2


@pytest.mark.parametrize("bits", [32, 8])
def test_a_step_waits_for_nothing(bits: Bits) -> None:
    params = parameters(3)
    optimizer = FlatAdamW(params, bits=bits, learning_rate=0.1, copy_dtype=torch.bfloat16)
    give_gradients(params, 1)
    loss = torch.ones((), device="cuda")
    optimizer.step(divisor=3.0, loss=loss)

    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step(divisor=3.0, loss=loss)
        optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bits", [32, 8])
def test_steps_are_those_of_a_cpu_up_to_rounding_and_copies_are_their_values(bits: Bits) -> None:
    on_gpu = parameters(20)
    on_cpu = [nn.Parameter(param.detach().cpu()) for param in on_gpu]
    optimizers = [
        FlatAdamW(params, bits=bits, learning_rate=0.01, copy_dtype=torch.bfloat16)
        for params in (on_gpu, on_cpu)
    ]

    for seed in range(5):
        for params, optimizer in zip((on_gpu, on_cpu), optimizers, strict=True):
            give_gradients(params, seed)
            optimizer.step(divisor=7.0)

    for param, other in zip(on_gpu, on_cpu, strict=True):
        # A moment beside a threshold of its 8-bit map may get the next code.
        tolerance = 1e-5 if bits == 32 else 2e-3
        torch.testing.assert_close(param.detach().cpu(), other.detach(), rtol=0, atol=tolerance)
        working = optimizers[0].working_copy(param)
        assert working is not None
        assert torch.equal(working.values, param.detach().bfloat16())
