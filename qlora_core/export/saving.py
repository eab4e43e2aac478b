"""Saves LoRA adapters in the format of the PEFT library (as 0.21 writes it).

Servers read the same folder, so it holds nothing that they refuse and that can be helped: short target names, and never
a base layer's weight.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from torch import Tensor, nn

from qlora_core.export.adapter_config import CONFIG, describe, read_config
from qlora_core.export.adapter_folder import PREFIX, WEIGHTS
from qlora_core.export.model_card import model_card
from qlora_core.export.serving import serving_warnings
from qlora_core.models.writing import write_file
from qlora_core.nn import lora_modules, saved_modules

_CARD = "README.md"


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
        OSError: the disk is full, or refuses to be written to; it names the folder, which is as it was.
    """
    base_model = base_model_name_or_path or getattr(model, "name_or_path", "")
    config = describe(model, base_model_name_or_path=base_model, fold_rslora=fold_rslora)
    tensors = adapter_tensors(model)
    folder = Path(folder)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as unfinished:
            (Path(unfinished) / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
            write_file(Path(unfinished) / WEIGHTS, tensors)
            warnings = serving_warnings(read_config(Path(unfinished) / CONFIG), model)
            (Path(unfinished) / _CARD).write_text(model_card(config, warnings), "utf-8")
            names = (CONFIG, WEIGHTS, _CARD)
            return [(Path(unfinished) / name).replace(folder / name) for name in names]
    except BaseException as error:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None:
            error.filename, error.filename2 = str(folder), None
        raise


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
