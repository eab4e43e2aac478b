"""Copies a base model's tokenizer and chat template beside an adapter.

An adapter answers well only with the template and the stop token it was trained with, so both travel
with it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_TEMPLATES = "additional_chat_templates"


def save_tokenizer_files(model_folder: Path | str, folder: Path | str) -> list[Path]:
    """Copy the tokenizer files that are there; give the paths written.

    Args:
        model_folder: of the base model.
        folder: of the adapter; made if it is not there.
    """
    source, target = Path(model_folder), Path(folder)
    names = [Path(name) for name in _FILES if (source / name).is_file()]
    names += [path.relative_to(source) for path in sorted((source / _TEMPLATES).glob("*.jinja"))]
    written: list[Path] = []
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        written.append(Path(shutil.copyfile(source / name, target / name)))
    return written
