"""An adapter that changes what a model says, on disk."""

from __future__ import annotations

from pathlib import Path

import torch

from qlora_core import LoraConfig, add_lora, load_model, save_adapter
from qlora_core.nn import lora_modules


def save_strong_adapter(base: Path, folder: Path) -> Path:
    """Save an adapter whose B is not zero; give ``folder``."""
    model = load_model(base, device="cpu", compute_dtype=torch.float32)
    add_lora(model, LoraConfig(r=4, alpha=16), seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for adapter in lora_modules(model).values():
            torch.nn.init.normal_(adapter.lora_B, std=0.3)
    save_adapter(model, folder)
    return folder
