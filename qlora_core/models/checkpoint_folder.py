"""The folder of a checkpoint besides its weights: where it may be, its configuration, and what is copied into it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel

from qlora_core.errors import ConfigError, ModelUnsupported
from qlora_core.whole_folder import leftovers, real

# What stands beside a model's weights: its tokenizer, its chat template, and its licence.
_BESIDE = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def find_source(model: PreTrainedModel, source: str | Path | None) -> Path | None:
    """Give the folder that the model came from, if it is known and there."""
    known = source or model.config.name_or_path
    return Path(known) if known and Path(known).is_dir() else None


def refuse_target(
    folder: Path, source: Path | None, *, overwrite: bool, inputs: Iterable[Path] = ()
) -> None:
    """Refuse to write where that would fail, or take away what is there.

    Raises:
        ConfigError: the folder is a file, a mount point, the current folder or above it, cannot be made, has files in it
            that are not to be replaced, or holds ``source`` or one of ``inputs``; or a run that was cut off has set aside
            what it was.
    """
    target = real(folder)
    if target.is_symlink():
        raise ConfigError(f"{folder} is a link that leads nowhere; name a folder to save to")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{folder} is a file; name a folder to save to")
    if ".." in folder.parts and not folder.parent.is_dir():
        raise ConfigError(f"{folder} leads through a folder that is not there; name it without ..")
    if source is not None and target in (real(source), *real(source).parents):
        raise ConfigError(f"{folder} holds the model that is to be saved; name another folder")
    inputs = tuple(inputs)
    for one in inputs:
        if target in (real(one), *real(one).parents):
            raise ConfigError(f"{folder} holds {one}, which is read; name another folder")
    here = Path.cwd()
    if target in (here, *here.parents):
        raise ConfigError(f"{folder} is the current folder, or above it; name a folder of its own")
    if target.is_mount():
        raise ConfigError(
            f"{folder} is a mount point, which cannot be replaced; name a folder in it"
        )
    _refuse_leftovers(folder, target, inputs if source is None else (source, *inputs))
    _refuse_unwritable(target)
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ConfigError(
            f"{folder} has files in it; name another folder, or have it replaced "
            "(overwrite=True, --force)"
        )


def _refuse_leftovers(folder: Path, target: Path, inputs: Iterable[Path]) -> None:
    for left in leftovers(target):
        if any(left in (real(one), *real(one).parents) for one in inputs):
            raise ConfigError(
                f"{left} is what a run to {folder} has left, which the next one removes; rename it first"
            )
        if left.suffix == ".replaced":
            raise ConfigError(
                f"{left} is what {folder} was before a run that was cut off; rename it, or delete it"
            )


def _refuse_unwritable(target: Path) -> None:
    above = next(one for one in target.parents if one.exists())
    if not above.is_dir():
        raise ConfigError(f"{above} is a file, so there can be no folder {target}")
    try:
        name = f".{target.name}."  # as long as the one that it is going to be written under
        Path(tempfile.mkdtemp(prefix=name, suffix=".unfinished", dir=above)).rmdir()
    except OSError as error:
        raise ConfigError(
            f"{above} cannot be written to ({error.strerror}); name another folder"
        ) from error


def whole_config(model: PreTrainedModel, source: Path | None) -> Any:  # noqa: ANN401 - of any family
    """Give a configuration of the model to save beside its weights, a copy.

    Raises:
        ModelUnsupported: the model is a part of a larger one whose configuration is not at hand.
    """
    config: Any = deepcopy(model.config)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        # The language model's part of a larger configuration, which alone says what to load.
        if source is None:
            raise ModelUnsupported(
                f"the configuration of a {type(model).__name__} is a part of a larger one; "
                "name the folder that the model came from as source"
            )
        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    config.architectures = [type(model).__name__]
    return config


def copy_beside(model: PreTrainedModel, source: Path | None, folder: Path) -> None:
    """Write the model's generation settings, and copy what else stands beside the weights in ``source``."""
    if model.generation_config is not None and model.can_generate():
        model.generation_config.save_pretrained(folder)
    if source is None:
        return
    for pattern in _BESIDE:
        for path in source.glob(pattern):
            target = folder / path.relative_to(source)
            if path.is_file() and not target.exists():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
