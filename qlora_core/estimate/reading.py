"""Reads a model's config.json, and says in a sentence what of it cannot be used."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_core.errors import ModelNotFound, ModelUnsupported

ModelConfig = Mapping[str, Any] | str | os.PathLike[str]


def read_model_config(source: ModelConfig) -> tuple[Mapping[str, Any], str]:
    """Give the fields of a config.json, and what to call it in messages.

    Args:
        source: the fields themselves, a config.json, or a folder with one.

    Raises:
        ModelNotFound: there is no such file.
        ModelUnsupported: the file is not a JSON object.
    """
    if isinstance(source, Mapping):
        return source, "the model's config"
    path = Path(source)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        raise ModelNotFound(f"there is no {path}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelUnsupported(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelUnsupported(f"{path} must hold a JSON object")
    return config, str(path)
