"""Reads an adapter's folder, as `save_adapter` or PEFT wrote it, and sorts its tensors by what they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from qlora_core.errors import AdapterError
from qlora_core.export.adapter_config import CONFIG, read_config
from qlora_core.nn import LoraConfig

PREFIX = "base_model.model."
"""Begins every tensor's name; after it comes the path in the model."""

WEIGHTS = "adapter_model.safetensors"

_HALVES = ("lora_A", "lora_B")


@dataclass(frozen=True, eq=False)
class AdapterFolder:
    """What is in an adapter's folder.

    Attributes:
        folder: where it is.
        config: from adapter_config.json.
        pairs: A [r, in_features] and B [out_features, r] by the path of the layer they belong to.
        whole: the parameters of modules that were trained whole, by path.
        base_copies: weights of the base model that PEFT writes beside adapters over the output head, by path of the
            layer; they are the base's own and not needed.
    """

    folder: Path
    config: LoraConfig
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    whole: Mapping[str, Tensor]
    base_copies: Mapping[str, Tensor]


def read_adapter(folder: Path) -> AdapterFolder:
    """Read an adapter's folder.

    Raises:
        AdapterError: a file is not there or malformed, the adapter uses what this engine cannot apply, or a tensor is
            missing or unknown.
    """
    config = read_config(folder / CONFIG)
    halves: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    base_copies: dict[str, Tensor] = {}
    for key, tensor in _read_tensors(folder / WEIGHTS).items():
        name = key.removeprefix(PREFIX)
        owner, _, part = name.removesuffix(".weight").rpartition(".")
        if part in _HALVES and name != key:
            halves.setdefault(owner, {})[part] = tensor
        elif part == "base_layer" and name != key:
            base_copies[owner] = tensor
        elif config.modules_to_save and ".lora_" not in name and name != key:
            whole[name] = tensor
        else:
            raise AdapterError(f"The adapter in {folder} holds the unknown tensor {key}.")
    if not halves:
        raise AdapterError(f"The adapter in {folder} holds no LoRA tensors.")
    pairs = {owner: _pair(folder, owner, pair) for owner, pair in halves.items()}
    return AdapterFolder(folder, config, pairs, whole, base_copies)


def _pair(folder: Path, owner: str, pair: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    for half in _HALVES:
        if half not in pair:
            key = f"{PREFIX}{owner}.{half}.weight"
            raise AdapterError(f"The adapter in {folder} lacks the tensor {key}.")
    return pair["lora_A"], pair["lora_B"]


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise AdapterError(f"The adapter folder {path.parent} has no {path.name}.")
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
