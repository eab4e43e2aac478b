"""In which precision a run computes: adapters and their optimizer in float32 whatever the model's dtype."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_core import Dataset, TextEncoder, TrainConfig, load_model, train
from qlora_core.nn import add_lora, lora_modules
from qlora_core.nn.nf4_linear import product_dtype
from qlora_core.train import Event, StepMetrics


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_cpu_multiplies_in_float32_and_a_gpu_as_it_is_told(dtype: torch.dtype) -> None:
    assert product_dtype(dtype, torch.device("cpu")) == torch.float32
    assert product_dtype(dtype, torch.device("cuda")) == dtype


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_16_bit_model_trains_a_float32_adapter(
    device: str,
    base: Path,
    encoder: TextEncoder,
    config: Callable[..., TrainConfig],
    make_dataset: Callable[..., Dataset],
    tmp_path: Path,
) -> None:
    model = load_model(base, device=device, compute_dtype=torch.bfloat16)
    events: list[Event] = []
    seen: set[torch.dtype] = set()

    def look(_: Any, inputs: Any) -> None:
        seen.add(inputs[0].dtype)

    model.get_submodule("model.norm").register_forward_pre_hook(look)
    # Steps this small are lost in bfloat16: A's elements are about 0.1, where its numbers are 0.0005 apart.
    settings = config(n_epochs=1, learning_rate=1e-5, warmup_steps=0, lr_scheduler_type="constant")

    train(model, encoder, make_dataset(8), settings, events.append, output_dir=tmp_path)

    assert seen == {torch.bfloat16}
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    adapters = lora_modules(model)
    assert {a.lora_A.dtype for a in adapters.values()} == {torch.float32}
    # B's first step is of the rate's size, and A moves after it: none of them by a bfloat16 step.
    largest_b = max(float(adapter.lora_B.detach().abs().max()) for adapter in adapters.values())
    assert largest_b == pytest.approx(2e-5, rel=0.2)
    fresh = load_model(base, device=device, compute_dtype=torch.bfloat16)
    add_lora(fresh, settings.lora, seed=settings.seed)
    moved = [
        (adapters[path].lora_A - start.lora_A).detach().abs().max()
        for path, start in lora_modules(fresh).items()
    ]
    assert all(0 < float(step) <= 1.1e-5 for step in moved)
    losses = [event.train_loss for event in events if isinstance(event, StepMetrics)]
    assert all(loss is not None and loss > 0 for loss in losses)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_frozen_stays_in_16_bits(
    dtype: torch.dtype,
    base: Path,
    encoder: TextEncoder,
    config: Callable[..., TrainConfig],
    make_dataset: Callable[..., Dataset],
    tmp_path: Path,
) -> None:
    """Embeddings, head and norms in float32 cost 2 of the 8 GB of an 8B model (peft #816, bitsandbytes #1569)."""
    model = load_model(base, device="cpu", compute_dtype=dtype)
    events: list[Event] = []
    frozen = {name: p.data_ptr() for name, p in model.named_parameters()}

    train(model, encoder, make_dataset(8), config(n_epochs=1), events.append, output_dir=tmp_path)

    after = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= after.keys()
    assert {name: p.data_ptr() for name, p in after.items()} == frozen
    assert {p.dtype for p in after.values()} == {dtype}
    losses = [event.train_loss for event in events if isinstance(event, StepMetrics)]
    assert len(losses) == 2
    assert all(loss is not None for loss in losses)
