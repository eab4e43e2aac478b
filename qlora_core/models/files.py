"""Finds a model folder's weight files and refuses, in a sentence, what cannot be read safely.

Only safetensors files are opened. Pickle files (`pytorch_model.bin`) can run code when read, so
they are named in the error and never touched. Needs no torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qlora_core.errors import (
    ModelNotFound,
    ModelUnsupported,
    ModelWeightsInvalid,
    ModelWeightsMissing,
    ModelWeightsPickle,
)
from qlora_core.models.header import HeaderError, TensorPlace, read_header
from qlora_core.quoting import quoted

_log = logging.getLogger(__name__)

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin.index.json")


@dataclass(frozen=True)
class WeightFiles:
    """Where each tensor of a checkpoint is.

    Attributes:
        places: of the tensors, by the checkpoint's own names.
        total_bytes: size of all files together.
    """

    places: dict[str, TensorPlace]
    total_bytes: int


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a model folder.

    Raises:
        ModelNotFound: the folder or its config.json is not there.
        ModelUnsupported: config.json is not a JSON object.
    """
    if not folder.is_dir():
        raise ModelNotFound(f"there is no model folder {folder}")
    path = folder / "config.json"
    if not path.is_file():
        raise ModelNotFound(f"the model folder {folder} has no config.json")
    config = _read_json(path, ModelUnsupported)
    if not isinstance(config, dict):
        raise ModelUnsupported(f"{path} must hold a JSON object")
    return config


def find_weights(folder: Path) -> WeightFiles:
    """List the safetensors shards of a model folder and the tensors in them.

    Raises:
        ModelWeightsMissing: there are no weight files, or the index names one that is not there.
        ModelWeightsPickle: there are weights, but only as pickle files.
        ModelWeightsInvalid: a file is truncated or malformed, or disagrees with the index.
    """
    shards, indexed = find_shards(folder)
    places: dict[str, TensorPlace] = {}
    for shard in shards:
        for name, place in _tensors_in(shard).items():
            if name in places:
                raise ModelWeightsInvalid(
                    f"the tensor {name} is in two files, {places[name].path.name} and {shard.name}"
                )
            places[name] = place
    for name, shard_name in indexed.items():
        if name not in places or places[name].path.name != shard_name:
            raise ModelWeightsInvalid(
                f"{_INDEX} says that {shard_name} holds the tensor {quoted(name)}, but it does not"
            )
    if not places:
        raise ModelWeightsMissing(f"the weight files of {folder} hold no tensors")
    return WeightFiles(places, sum(shard.stat().st_size for shard in shards))


def find_shards(
    folder: Path, names: Collection[str] | None = None
) -> tuple[list[Path], dict[str, str]]:
    """Give the shards in order, and what the index (if there is one) says about them; opens none of them.

    Where there are both a single file and an index, the file is taken, as transformers does, and the log says so.

    `names`: of the files that the model has, where its weights are not in the folder yet; None: what is there.

    Raises:
        ModelWeightsMissing, ModelWeightsPickle, ModelWeightsInvalid: as `find_weights`.
    """
    if names is None:
        names = {path.name for path in folder.glob("*") if path.is_file()}
    if _SINGLE in names:
        if _INDEX in names:
            _log.warning(
                "%s has both %s and %s; the former is read, as transformers does",
                folder,
                _SINGLE,
                _INDEX,
            )
        return [folder / _SINGLE], {}
    if _INDEX in names:
        indexed = _read_index(folder / _INDEX)
        shards = [folder / name for name in sorted(set(indexed.values()))]
        for shard in shards:
            if shard.name not in names:
                raise ModelWeightsMissing(
                    f"{_INDEX} names the file {quoted(shard.name)}, but {folder} does not have it"
                )
        return shards, indexed
    pickles = sorted(name for name in names if any(fnmatch(name, p) for p in _PICKLE_PATTERNS))
    if pickles:
        raise ModelWeightsPickle(
            f"the model in {folder} has its weights only as pickle files ({pickles[0]}), which can "
            "run code and are never opened; convert them to safetensors"
        )
    raise ModelWeightsMissing(f"the model folder {folder} has no {_SINGLE} and no {_INDEX}")


def _read_index(path: Path) -> dict[str, str]:
    index = _read_json(path, ModelWeightsInvalid)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelWeightsInvalid(f"{path} has no weight_map")
    for name, shard in weight_map.items():
        # Only files of this very folder: an index must not lead anywhere else.
        if not isinstance(shard, str) or Path(shard).name != shard or shard in {"", ".", ".."}:
            raise ModelWeightsInvalid(
                f"{path.name} gives {quoted(name)} a file that is no plain name"
            )
        if not shard.endswith(".safetensors"):
            raise ModelWeightsPickle(
                f"{path.name} names {quoted(shard)}, which is not a safetensors file; "
                "only safetensors files are opened"
            )
    return weight_map


def _tensors_in(shard: Path) -> dict[str, TensorPlace]:
    try:
        return read_header(shard)
    except (HeaderError, OSError) as error:
        raise ModelWeightsInvalid(
            f"the weight file {shard.name} is truncated or malformed ({error}); copy it again"
        ) from error


def _read_json(path: Path, wrong: type[ModelUnsupported | ModelWeightsInvalid]) -> Any:  # noqa: ANN401 - JSON
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise wrong(f"{path} is not readable JSON ({error})") from error
