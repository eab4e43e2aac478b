"""Spoils a model's folder in one place, and takes the refusal of loading it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_core import ModelError, load_model


def refusal(folder: Path, **settings: Any) -> ModelError:
    with pytest.raises(ModelError) as told:
        load_model(folder, **{"device": "cpu", "compute_dtype": torch.float32, **settings})
    assert "\n" not in told.value.message
    assert len(told.value.message) < 1000
    return told.value


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
