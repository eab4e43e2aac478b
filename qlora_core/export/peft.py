"""Saves and loads LoRA adapters in the format of the PEFT library (written by 0.21).

Servers read the same folder, so it holds nothing that they refuse: short target names, only
``lora_A`` and ``lora_B`` tensors, never a base layer's weight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from qlora_core.errors import AdapterError
from qlora_core.nn import LoraConfig, LoraLinear, add_lora, lora_modules

_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_PEFT_VERSION = "0.21.2"
# What PEFT can do and this engine cannot apply, with the value that means "not used".
_UNUSED: Mapping[str, Any] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "use_dora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "trainable_token_indices": None,
    "target_parameters": None,
}


def save_adapter(
    model: nn.Module, folder: Path | str, *, base_model_name_or_path: str
) -> list[Path]:
    """Write a model's adapter as a PEFT folder: weights, config and a model card.

    Args:
        model: with adapters (``add_lora``); their tensors are written in the dtype they have.
        folder: made if it is not there; files of an earlier adapter in it are replaced.
        base_model_name_or_path: what the adapter belongs to, for whoever loads it.

    Returns:
        The files written.

    Raises:
        AdapterError: the model has no adapters, or adapters of several ranks or scales.
    """
    adapters = lora_modules(model)
    config = _config(model, adapters, base_model_name_or_path)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    (folder / "README.md").write_text(_model_card(config), "utf-8")
    tensors = {key: value.cpu() for key, value in adapter_tensors(model).items()}
    safetensors.torch.save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    return [folder / name for name in (_CONFIG, _WEIGHTS, "README.md")]


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's tensors under PEFT's names; they are the model's own, not copies."""
    return {
        f"{_PREFIX}{path}.{name}.weight": getattr(adapter, name).detach()
        for path, adapter in lora_modules(model).items()
        for name in ("lora_A", "lora_B")
    }


def load_adapter(model: nn.Module, folder: Path | str) -> None:
    """Put a saved adapter over a model that has none; it can be trained on.

    Args:
        model: a base model, dense or quantized, without adapters.
        folder: as ``save_adapter`` or PEFT wrote it.

    Raises:
        AdapterError: the folder is incomplete or malformed, uses something this engine cannot apply,
            or was made for another model.
        ConfigError: the model has adapters already.
    """
    folder = Path(folder)
    config = _read_config(folder / _CONFIG)
    tensors = _read_tensors(folder / _WEIGHTS)
    pairs = _pairs(tensors, folder)
    linears = dict(model.named_modules())
    for path, (lora_a, lora_b) in pairs.items():
        _check_fits(path, linears.get(path), lora_a, lora_b, config["r"])
    add_lora(
        model,
        LoraConfig(
            r=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout") or 0.0,
            target_modules=tuple(pairs),
        ),
    )
    adapters = lora_modules(model)
    for path, (lora_a, lora_b) in pairs.items():
        with torch.no_grad():
            adapters[path].lora_A.copy_(lora_a)
            adapters[path].lora_B.copy_(lora_b)
        if config.get("use_rslora"):
            adapters[path].scaling = config["lora_alpha"] / config["r"] ** 0.5


def _config(
    model: nn.Module, adapters: Mapping[str, LoraLinear], base_model: str
) -> dict[str, Any]:
    if not adapters:
        raise AdapterError("The model has no LoRA adapters to save.")
    shapes = {(adapter.r, adapter.scaling, adapter.dropout) for adapter in adapters.values()}
    if len(shapes) > 1:
        raise AdapterError("The model's adapters have several ranks, scales or dropouts.")
    r, scaling, dropout = shapes.pop()
    alpha = scaling * r
    return {
        **_UNUSED,
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "peft_type": "LORA",
        "peft_version": _PEFT_VERSION,
        "r": r,
        "revision": None,
        "target_modules": _target_names(model, adapters),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }


def _target_names(model: nn.Module, adapters: Mapping[str, LoraLinear]) -> list[str]:
    """Name the targets by their last part; in full where that part also names something else."""
    inside = tuple(f"{path}." for path in adapters)
    others = {
        path.rpartition(".")[2]
        for path, _ in model.named_modules()
        if path not in adapters and not path.startswith(inside)
    }
    names = {path: path.rpartition(".")[2] for path in adapters}
    return sorted({path if name in others else name for path, name in names.items()})


def _model_card(config: Mapping[str, Any]) -> str:
    base_model = config["base_model_name_or_path"]
    quoted = json.dumps(base_model, ensure_ascii=False)  # a JSON string is a YAML string
    targets = ", ".join(config["target_modules"])
    return f"""---
base_model: {quoted}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- qlora
---

# LoRA adapter for {base_model}

Trained with QLoRA (base weights in NF4) by qlora_core. Rank {config["r"]}, alpha
{config["lora_alpha"]}, dropout {config["lora_dropout"]}, on {targets}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({quoted})
model = PeftModel.from_pretrained(base, "path/of/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")
```

The tokenizer and the chat template beside it are those it was trained with.
"""


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"The adapter folder {path.parent} has no {path.name}.") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{path} does not describe a LoRA adapter.")
    for name, unused in _UNUSED.items():
        if (config.get(name) or None) != (unused or None):
            raise AdapterError(f"{path} uses {name}, which this engine cannot apply.")
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise AdapterError(f"{path} must give {name} as a number above 0, not {value!r}.")
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise AdapterError(f"The adapter folder {path.parent} has no {path.name}.")
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error


def _pairs(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B by module path."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for key in tensors:
        path = key.removeprefix(_PREFIX)
        if path == key or not path.endswith((".lora_A.weight", ".lora_B.weight")):
            raise AdapterError(f"The adapter in {folder} holds the unknown tensor {key}.")
        path = path[: -len(".lora_A.weight")]
        try:
            pairs[path] = (
                tensors[f"{_PREFIX}{path}.lora_A.weight"],
                tensors[f"{_PREFIX}{path}.lora_B.weight"],
            )
        except KeyError as error:
            raise AdapterError(f"The adapter in {folder} lacks the tensor {error}.") from error
    if not pairs:
        raise AdapterError(f"The adapter in {folder} holds no tensors.")
    return pairs


def _check_fits(
    path: str, module: nn.Module | None, lora_a: Tensor, lora_b: Tensor, r: int
) -> None:
    if module is None or not hasattr(module, "in_features"):
        raise AdapterError(f"The model has no linear layer {path}; the adapter is for another one.")
    wanted = ([r, module.in_features], [module.out_features, r])
    found = (list(lora_a.shape), list(lora_b.shape))
    if found != wanted:
        raise AdapterError(
            f"The adapter's tensors for {path} are {found[0]} and {found[1]}, but the model and the "
            f"rank {r} need {wanted[0]} and {wanted[1]}."
        )
