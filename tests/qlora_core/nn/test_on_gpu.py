"""The same layers on a GPU: what Triton and bfloat16 give is what the CPU gives in float32."""

import pytest
import torch
from torch import Tensor

from qlora_core import NF4Linear, quantize_nf4
from qlora_core.nn import LoraLinear

pytestmark = pytest.mark.gpu


def adapter(device: str, *, dropout: float = 0.0) -> LoraLinear:
    generator = torch.Generator().manual_seed(5)
    weight = quantize_nf4((torch.randn(192, 256, generator=generator) / 16).to(device))
    a = torch.randn(8, 256, generator=generator) / 16
    b = torch.randn(192, 8, generator=generator)
    base = NF4Linear(weight, compute_dtype=torch.bfloat16)
    return LoraLinear(base, a.to(device), b.to(device), alpha=16, dropout=dropout)


def step(layer: LoraLinear, x: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.float().square().mean().backward()
    assert x.grad is not None
    assert layer.lora_A.grad is not None
    assert layer.lora_B.grad is not None
    return y.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad


def test_quantizing_gives_the_cpus_codes() -> None:
    weight = torch.randn(192, 256, generator=torch.Generator().manual_seed(1))

    on_gpu, on_cpu = quantize_nf4(weight.cuda()), quantize_nf4(weight)

    assert torch.equal(on_gpu.packed.cpu(), on_cpu.packed)
    # The mean of the scales may be summed in another order, so the 8-bit codes may differ by one.
    assert (on_gpu.absmax.cpu().int() - on_cpu.absmax.int()).abs().max() <= 1


def test_a_training_step_equals_the_cpus_within_bfloat16() -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(6)).bfloat16()

    on_gpu, on_cpu = step(adapter("cuda"), x.cuda()), step(adapter("cpu"), x)

    for actual, expected in zip(on_gpu, on_cpu, strict=True):
        error = (actual.cpu().float() - expected.float()).norm() / expected.float().norm()
        assert error < 0.02


def test_dropout_on_a_gpu_follows_the_global_seed() -> None:
    layer = adapter("cuda", dropout=0.5)
    x = torch.randn(64, 256).bfloat16().cuda()

    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)

    assert torch.equal(layer(x), first)


def test_memory_holds_no_dense_weight_between_forward_and_backward() -> None:
    weight = quantize_nf4(torch.randn(4096, 4096, device="cuda"))
    layer = NF4Linear(weight, compute_dtype=torch.bfloat16)
    x = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    before = torch.cuda.memory_allocated()

    y = layer(x)

    # Output only; the weight would be 32 MiB.
    assert torch.cuda.memory_allocated() - before < 2**20
    y.sum().backward()
