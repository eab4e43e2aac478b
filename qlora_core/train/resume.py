"""Resume points: everything needed to go on exactly, in safetensors and JSON.

A point is a folder ``step-N`` with the adapter, the best adapter so far where that one is to be
offered, the optimizer's moments, the random states, where in which epoch the run is, and a manifest
of sha256 sums. One whose files do not match its manifest is refused by name and the one before is
taken.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from qlora_core.errors import ResumePointError
from qlora_core.models.writing import write_file
from qlora_core.train.folders import step_folder, step_folders
from qlora_core.train.progress import Progress
from qlora_core.train.weights import Weights, fits, put_back, trained_weights
from qlora_core.whole_folder import remove_leftovers, written_whole

_KEPT = 2
_MANIFEST = "manifest.json"
_STATE = "state.json"
_ADAPTER = "adapter.safetensors"
_BEST = "best.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_RANDOM = "random.safetensors"
_TENSORS = (_ADAPTER, _BEST, _OPTIMIZER, _RANDOM)


def save_resume_point(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    best: Weights,
    identity: dict[str, Any],
) -> Path:
    """Write a point under ``folder`` and delete all but the last two up to it; those of later steps stay.

    Args:
        folder: that of all resume points of a run.
        model: its trainable parameters are saved.
        optimizer: over these parameters.
        progress: where the run is.
        best: the trainable parameters at the best validation; empty where none are kept.
        identity: what a run must have in common with this one to go on from here (JSON values).

    Returns:
        The new point's folder.

    Raises:
        OSError: the disk is full, or refuses to be written to; nothing is left of the point.
    """
    target = step_folder(folder, progress.step)
    with written_whole(target) as unfinished:
        states = (trained_weights(model), best, _optimizer_state(optimizer), _random_state())
        for name, tensors in zip(_TENSORS, states, strict=True):
            write_file(unfinished / name, tensors)
        state = {"progress": asdict(progress), "identity": identity}
        (unfinished / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        sums = {path.name: _sha256(path) for path in sorted(unfinished.iterdir())}
        (unfinished / _MANIFEST).write_text(json.dumps(sums, indent=1), encoding="utf-8")
    until_now = [point for step, point in step_folders(folder) if step <= progress.step]
    for old in until_now[_KEPT:]:
        shutil.rmtree(old)
    remove_leftovers(folder)
    return target


def load_resume_point(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    on_refused: Callable[[Path, str], None],
) -> tuple[Progress, Weights] | None:
    """Bring model, optimizer and random states to the newest whole point.

    Args:
        folder: that of all resume points, or of one.
        model: with its adapters; moved to the point.
        optimizer: over the model's trainable parameters; moved to the point.
        identity: of the run that wants to go on.
        on_refused: told which point is not whole, and why.

    Returns:
        Where the run was and its best adapter, or None where there is no whole point: nothing was
        changed.

    Raises:
        ResumePointError: a point is whole but belongs to another run.
    """
    points = [folder] if (folder / _MANIFEST).is_file() else [p for _, p in step_folders(folder)]
    for point in points:
        try:
            progress, found, (adapter, best, moments, random) = _read(point)
        except ResumePointError as error:
            on_refused(point, error.message)
            continue
        _check_identity(point, found, identity)
        if not fits(model, adapter) or (best and not fits(model, best)):
            raise ResumePointError(f"The resume point {point.name} is of another adapter or model.")
        put_back(model, adapter)
        _restore_optimizer(point, optimizer, moments)
        _restore_random(random)
        return progress, best
    return None


def set_aside(point: Path) -> None:
    """Rename a point that is not whole, so that it counts as none of the last two and is not tried again."""
    aside = point.with_name(f"{point.name}.torn")
    if aside.exists():
        shutil.rmtree(aside)
    point.rename(aside)


def _read(point: Path) -> tuple[Progress, dict[str, Any], list[Weights]]:
    """Return progress, identity and the tensors of each file, if the files are those written."""
    try:
        sums = json.loads((point / _MANIFEST).read_text(encoding="utf-8"))
        for name in (_STATE, *_TENSORS):
            if _sha256(point / name) != sums[name]:
                raise ResumePointError(
                    f"The resume point {point.name} is torn: {name} has changed."
                )
        state = json.loads((point / _STATE).read_text(encoding="utf-8"))
        progress, identity = Progress(**state["progress"]), dict(state["identity"])
        tensors = [safetensors.torch.load_file(point / name) for name in _TENSORS]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ResumePointError(f"The resume point {point.name} is torn: {reason}.") from error
    return progress, identity, tensors


def _check_identity(point: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    found, wanted = _by_setting(found), _by_setting(wanted)
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise ResumePointError(
                f"The resume point {point.name} belongs to another run: its {name} is "
                f"{found.get(name)!r}, not {wanted.get(name)!r}."
            )


def _by_setting(identity: dict[str, Any]) -> dict[str, Any]:
    """Lift out what a group of settings holds: a message about one of them names that one."""
    flat: dict[str, Any] = {}
    for name, value in identity.items():
        inner = _by_setting(value) if isinstance(value, dict) else None
        flat |= {name: value} if not inner else {f"{name}.{key}": one for key, one in inner.items()}
    return flat


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the moments by ``<number of the parameter>.<name of the moment>``."""
    return {
        f"{index}.{name}": value
        for index, moments in optimizer.state_dict()["state"].items()
        for name, value in moments.items()
    }


def _restore_optimizer(
    point: Path, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    n_params = sum(len(group["params"]) for group in groups)
    if state and sorted(state) != list(range(n_params)):
        raise ResumePointError(f"The resume point {point.name} is of another optimizer.")
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _random_state() -> dict[str, Tensor]:
    states = {"cpu": torch.random.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random(states: dict[str, Tensor]) -> None:
    torch.random.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
