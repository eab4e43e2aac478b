"""Saves LoRA adapters in the format of the PEFT library (as 0.21 writes it).

Servers read the same folder, so it holds nothing that they refuse and that can be helped: short target names, and never
a base layer's weight.
"""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from qlora_core.export.adapter_config import CONFIG, describe, read_config
from qlora_core.export.adapter_folder import PREFIX, WEIGHTS
from qlora_core.export.model_card import model_card
from qlora_core.export.serving import serving_warnings
from qlora_core.nn import lora_modules, saved_modules


def save_adapter(
    model: nn.Module,
    folder: Path | str,
    *,
    base_model_name_or_path: str | None = None,
    fold_rslora: bool = False,
) -> list[Path]:
    """Write a model's adapter as a PEFT folder: weights, config and a model card.

    Args:
        model: with adapters (``add_lora``); their tensors are written in float32.
        folder: made if it is not there; files of an earlier adapter in it are replaced.
        base_model_name_or_path: what the adapter belongs to, for whoever loads it; where the model was loaded from if
            not given.
        fold_rslora: write rsLoRA's scale as an alpha that means the same without it, for what does not know rsLoRA.

    Returns:
        The files written.

    Raises:
        AdapterError: the model has no adapters.
    """
    base_model = base_model_name_or_path or getattr(model, "name_or_path", "")
    config = describe(model, base_model_name_or_path=base_model, fold_rslora=fold_rslora)
    tensors = _unshared(adapter_tensors(model))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / CONFIG, folder / WEIGHTS, folder / "README.md"]
    written[0].write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    safetensors.torch.save_file(tensors, written[1], metadata={"format": "pt"})
    card = model_card(config, serving_warnings(read_config(written[0]), model))
    written[2].write_text(card, "utf-8")
    return written


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's tensors under PEFT's names; they are the model's own, not copies."""
    tensors = {
        f"{PREFIX}{path}.{name}.weight": getattr(adapter, name).detach()
        for path, adapter in lora_modules(model).items()
        for name in ("lora_A", "lora_B")
    }
    for path, module in saved_modules(model).items():
        tensors |= {f"{PREFIX}{path}.{name}": p.detach() for name, p in module.trained.items()}
    return tensors


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring the tensors to the CPU, and one that is there under several names into a copy for each.

    PEFT looks for a shared matrix under the name of every module that has it; safetensors writes no shared memory.
    """
    seen: set[int] = set()
    unshared: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        on_cpu = tensor.cpu().contiguous()
        unshared[name] = on_cpu.clone() if tensor.data_ptr() in seen else on_cpu
        seen.add(tensor.data_ptr())
    return unshared
