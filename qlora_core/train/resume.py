"""Resume points: everything needed to go on exactly, in safetensors and JSON.

A point is a folder ``step-N`` with the adapter, the optimizer's moments, the random states, where in
which epoch the run is, and a manifest of sha256 sums. One whose files do not match its manifest is
refused by name and the one before is taken.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from qlora_core.errors import ResumePointError
from qlora_core.train.folders import step_folder, step_folders, written_whole

_KEPT = 2
_MANIFEST = "manifest.json"
_STATE = "state.json"
_ADAPTER = "adapter.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_RANDOM = "random.safetensors"


@dataclass
class Progress:
    """Where a run is, and the figures it has gathered.

    Attributes:
        step: optimizer steps done.
        epoch: the one that the next step belongs to, from 0.
        window: steps done in that epoch.
        trained_tokens: over the whole run.
        epoch_loss_sum, epoch_tokens: summed loss and trained tokens of the epoch so far.
        train_loss: mean over the last whole epoch, or over what there is of the first.
        step_loss, step_accuracy: of the last step that counted.
        valid_loss, valid_accuracy: of the last validation.
        not_finite_in_a_row: steps skipped just before.
    """

    step: int = 0
    epoch: int = 0
    window: int = 0
    trained_tokens: int = 0
    epoch_loss_sum: float = 0.0
    epoch_tokens: int = 0
    train_loss: float = 0.0
    step_loss: float | None = None
    step_accuracy: float | None = None
    valid_loss: float | None = None
    valid_accuracy: float | None = None
    not_finite_in_a_row: int = 0


def save_resume_point(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    identity: dict[str, Any],
) -> Path:
    """Write a point under ``folder`` and delete all but the last two.

    Args:
        folder: that of all resume points of a run.
        model: its trainable parameters are saved.
        optimizer: over these parameters.
        progress: where the run is.
        identity: what a run must have in common with this one to go on from here (JSON values).

    Returns:
        The new point's folder.
    """
    target = step_folder(folder, progress.step)
    with written_whole(target) as unfinished:
        safetensors.torch.save_file(_adapter_state(model), unfinished / _ADAPTER)
        safetensors.torch.save_file(_optimizer_state(optimizer), unfinished / _OPTIMIZER)
        safetensors.torch.save_file(_random_state(), unfinished / _RANDOM)
        state = {"progress": asdict(progress), "identity": identity}
        (unfinished / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        sums = {path.name: _sha256(path) for path in sorted(unfinished.iterdir())}
        (unfinished / _MANIFEST).write_text(json.dumps(sums, indent=1), encoding="utf-8")
    for _, old in step_folders(folder)[_KEPT:]:
        shutil.rmtree(old)
    return target


def load_resume_point(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    on_refused: Callable[[str], None],
) -> Progress | None:
    """Bring model, optimizer and random states to the newest whole point.

    Args:
        folder: that of all resume points, or of one.
        model: with its adapters; moved to the point.
        optimizer: over the model's trainable parameters; moved to the point.
        identity: of the run that wants to go on.
        on_refused: told which point is not whole, and why.

    Returns:
        Where the run was, or None where there is no whole point: nothing was changed.

    Raises:
        ResumePointError: a point is whole but belongs to another run.
    """
    points = [folder] if (folder / _MANIFEST).is_file() else [p for _, p in step_folders(folder)]
    for point in points:
        try:
            progress, found, adapter, moments, random = _read(point)
        except ResumePointError as error:
            on_refused(error.message)
            continue
        _check_identity(point, found, identity)
        _restore_adapter(point, model, adapter)
        _restore_optimizer(point, optimizer, moments)
        _restore_random(random)
        return progress
    return None


def _read(
    point: Path,
) -> tuple[Progress, dict[str, Any], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return progress, identity, adapter, moments and random states, if the files are those written."""
    try:
        sums = json.loads((point / _MANIFEST).read_text(encoding="utf-8"))
        for name in (_STATE, _ADAPTER, _OPTIMIZER, _RANDOM):
            if _sha256(point / name) != sums[name]:
                raise ResumePointError(
                    f"The resume point {point.name} is torn: {name} has changed."
                )
        state = json.loads((point / _STATE).read_text(encoding="utf-8"))
        progress, identity = Progress(**state["progress"]), dict(state["identity"])
        tensors = [safetensors.torch.load_file(point / n) for n in (_ADAPTER, _OPTIMIZER, _RANDOM)]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ResumePointError(f"The resume point {point.name} is torn: {reason}.") from error
    return progress, identity, tensors[0], tensors[1], tensors[2]


def _check_identity(point: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise ResumePointError(
                f"The resume point {point.name} belongs to another run: its {name} is "
                f"{found.get(name)!r}, not {wanted.get(name)!r}."
            )


def _adapter_state(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _restore_adapter(point: Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    if shapes != {name: tuple(value.shape) for name, value in parameters.items()}:
        raise ResumePointError(f"The resume point {point.name} is of another adapter or model.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the moments by ``<number of the parameter>.<name of the moment>``."""
    return {
        f"{index}.{name}": value.contiguous()
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
