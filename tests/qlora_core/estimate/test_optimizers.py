"""What the estimate knows of optimizers, held to the tensors of the optimizers themselves."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import nn

from qlora_core import estimate
from qlora_core.estimate import optimizers
from qlora_core.estimate.memory import MemoryEstimate
from qlora_core.optim import OPTIMIZERS, build_optimizer
from qlora_core.optim.flat_tensors import FlatTensors
from tests.qlora_core.estimate.families import config_of
from tests.qlora_core.estimate.live_tensors import distinct_bytes, moments

SIZES = [(1,), (255,), (3, 257), (256,), (7, 512), (1023,)]


def built(name: str) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    """Give an optimizer that has taken a step, and its parameters."""
    parameters = [nn.Parameter(torch.randn(size)) for size in SIZES]
    optimizer = build_optimizer(name, parameters, learning_rate=0.1)
    torch.stack([parameter.square().sum() for parameter in parameters]).sum().backward()
    optimizer.step()
    return optimizer, parameters


def test_every_optimizer_of_a_run_is_known() -> None:
    assert tuple(optimizers.OPTIMIZERS) == OPTIMIZERS


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_in_memory_is_known_to_the_byte(name: str) -> None:
    optimizer, parameters = built(name)

    known, tensors = optimizers.OPTIMIZERS[name], [one.numel() for one in parameters]
    assert known.state_bytes(tensors) == distinct_bytes(moments(optimizer))
    assert 4 * optimizers.buffer_elements(tensors) == distinct_bytes(parameters)
    gradients = [one.grad for one in parameters if one.grad is not None]
    assert 4 * optimizers.buffer_elements(tensors) == distinct_bytes(gradients)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_saved_of_each_tensor_is_known_to_the_byte(name: str) -> None:
    optimizer, parameters = built(name)

    known, tensors = optimizers.OPTIMIZERS[name], [one.numel() for one in parameters]
    assert known.saved_bytes(tensors) == sum(one.nbytes for one in moments(optimizer))
    assert known.saved_per_tensor * len(tensors) == len(moments(optimizer))


def test_a_copy_in_16_bits_is_as_large_as_half_the_buffer() -> None:
    parameters = [nn.Parameter(torch.randn(size)) for size in SIZES]
    copies = FlatTensors(parameters, copy_dtype=torch.bfloat16).copies

    assert copies is not None
    assert copies.nbytes == 2 * optimizers.buffer_elements([one.numel() for one in parameters])


def test_a_copy_is_kept_where_products_are_in_16_bits_and_nothing_is_trained_whole() -> None:
    whole = {"lora": {"modules_to_save": ["lm_head"]}}
    exact, rounded = memory_of("adamw", "cpu"), memory_of("adamw", "cuda")
    without = memory_of("adamw", "cuda", **whole)

    assert exact.adapter_bytes == exact.gradients_bytes
    assert 2 * rounded.adapter_bytes == 3 * rounded.gradients_bytes
    assert without.adapter_bytes == without.gradients_bytes


def memory_of(name: str, device: Literal["cuda", "cpu"], **settings: Any) -> MemoryEstimate:
    settings = {"batch_size": 1, "context_length": 256, "optimizer": name, **settings}
    return estimate(config_of("llama").to_dict(), settings, device=device).memory


def test_paged_moments_are_not_on_a_gpu_while_activations_are_at_their_peak() -> None:
    paged, unpaged = memory_of("paged_adamw", "cuda"), memory_of("adamw", "cuda")

    assert paged.optimizer_bytes == unpaged.optimizer_bytes == unpaged.optimizer_resident_bytes
    assert paged.optimizer_resident_bytes == 0
    assert paged.total_bytes == unpaged.total_bytes - paged.optimizer_bytes


def test_paged_moments_larger_than_the_activations_are_at_their_own_peak() -> None:
    paged = memory_of("paged_adamw", "cuda", context_length=8, lora={"r": 512})

    beside = paged.base_bytes + paged.adapter_bytes + paged.gradients_bytes
    assert paged.total_bytes == beside + paged.optimizer_bytes


def test_on_a_cpu_paged_moments_are_like_others() -> None:
    assert memory_of("paged_adamw_8bit", "cpu") == memory_of("adamw_8bit", "cpu")
