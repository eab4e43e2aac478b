"""Base models for the tests of adapters: in NF4 here, and for the oracles dense with what the codes stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_core import LoraConfig, NF4Linear, add_lora, load_model
from qlora_core.nn import lora_modules, saved_modules
from qlora_core.nn.lora import is_conv1d
from qlora_core.nn.nf4_experts import NF4Stack

IDS = torch.tensor([[5, 9, 100, 7, 44, 101, 2], [8, 8, 1, 90, 12, 3, 80]])


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """Load a base in NF4."""
    return load_model(folder, device="cpu", compute_dtype=torch.float32, **options)


def dequantized(folder: Path) -> Any:
    """Load a base with transformers, its weights in float32 those that the NF4 codes stand for."""
    dense: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for path, module in load(folder).named_modules():
            if isinstance(module, NF4Linear):
                weight = module.nf4.dequantize(torch.float32)
                owner = dense.get_submodule(path)
                owner.weight.copy_(weight.T if is_conv1d(owner) else weight)
            elif isinstance(module, NF4Stack):
                owner, _, name = path.rpartition(".")
                experts = dense.get_submodule(owner)
                for index, matrix in enumerate(getattr(experts, name)):
                    weight = module.nf4(index).dequantize(torch.float32)
                    matrix.copy_(weight.T if experts.is_transposed else weight)
    return dense.eval()


def randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Give every adapter and every module trained whole a state that matters."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for adapter in lora_modules(model).values():
            adapter.lora_B.normal_(std=0.2, generator=generator)
        for parameter in {p for one in saved_modules(model).values() for p in one.trained.values()}:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def with_adapter(folder: Path, config: LoraConfig) -> PreTrainedModel:
    """Load a base in NF4 with random adapters."""
    model = load(folder)
    add_lora(model, config, seed=1)
    return randomize(model)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Give the model's answers to `IDS`."""
    return model.eval()(input_ids=IDS).logits
