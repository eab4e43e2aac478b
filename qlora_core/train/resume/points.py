"""Resume points: everything needed to go on exactly.

A point holds the adapter, the best adapter so far where that one is to be offered, the optimizer's moments, the
random states of every device, where in which epoch the run is with the figures it has gathered, its settings, the
versions of the libraries, and the plan by which its steps were computed. There is no schedule in it: the learning
rate is a function of the step (`optim.schedule`), as the order of the examples is one of seed and epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_core.errors import ResumePointError
from qlora_core.quoting import quoted, shown
from qlora_core.train.progress import Progress
from qlora_core.train.resume.checking import check_place, check_tensors, checked_state
from qlora_core.train.resume.files import points_of, read_point, torn, write_point
from qlora_core.train.resume.random_states import random_states, restore_random_states
from qlora_core.train.resume.versions import library_versions
from qlora_core.train.weights import Weights, fits, put_back, trained_weights

_ADAPTER, _BEST, _OPTIMIZER, _RANDOM = _FILES = ("adapter", "best", "optimizer", "random")
# So many differences are told; of a run with another adapter there would be hundreds.
_TOLD = 8


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on.

    Attributes:
        point: its folder.
        progress: where the run was.
        best: its best adapter; empty where none is kept.
        plan: by which its steps were computed, as JSON values; None in a point that has none.
        reasons: sentences on what is not as it was, so that the run may not go on exactly.
    """

    point: Path
    progress: Progress
    best: Weights
    plan: dict[str, Any] | None
    reasons: list[str]


def save_resume_point(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    best: Weights,
    identity: dict[str, Any],
    plan: dict[str, Any] | None = None,
) -> Path:
    """Write a point under ``folder``.

    Args:
        folder: that of all resume points of a run.
        model: its trainable parameters are saved.
        optimizer: over these parameters.
        progress: where the run is.
        best: the trainable parameters at the best validation; empty where none are kept.
        identity: what a run must have in common with this one to go on from here (JSON values).
        plan: what it will follow to go on exactly (JSON values).

    Returns:
        The new point's folder.

    Raises:
        OSError: the disk is full, or refuses to be written to; nothing is left of the point.
    """
    # The largest first: it is still being hashed while the others are written.
    tensors = {
        _OPTIMIZER: _moments(optimizer),
        _ADAPTER: trained_weights(model),
        _BEST: best,
        _RANDOM: random_states(),
    }
    state = {
        "progress": asdict(progress),
        "identity": identity,
        "plan": plan,
        "versions": library_versions(),
    }
    return write_point(folder, progress.step, tensors, state)


def load_resume_point(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    on_refused: Callable[[Path, str], None],
    can_be: Callable[[Progress], bool] = lambda _: True,
) -> Resumed | None:
    """Bring model, optimizer and random states to the newest whole point.

    Args:
        folder: that of all resume points, or of one.
        model: with its adapters; moved to the point.
        optimizer: over the model's trainable parameters; moved to the point.
        identity: of the run that wants to go on.
        on_refused: told which point is not whole, or says what cannot be, and why.
        can_be: whether the run can ever have been where a point says.

    Returns:
        Where the run was, or None where there is no whole point: nothing was changed.

    Raises:
        ResumePointError: a point is whole but belongs to another run or version of the engine; nothing was changed.
    """
    for point in points_of(folder):
        try:
            state, tensors = read_point(point, _FILES)
        except ResumePointError as error:
            on_refused(point, error.message)
            continue
        try:
            progress = checked_state(point, state)
        except ValueError as error:
            on_refused(point, torn(point, error).message)
            continue
        _check_identity(point, state["identity"], identity)
        adapter, best, moments = (tensors[name] for name in (_ADAPTER, _BEST, _OPTIMIZER))
        if not fits(model, adapter) or (best and not fits(model, best)):
            raise ResumePointError(f"The resume point {point.name} is of another adapter or model.")
        try:
            check_place(progress, can_be)
            check_tensors(model, moments, tensors[_RANDOM], adapter, best)
        except ValueError as error:
            on_refused(point, torn(point, error).message)
            continue
        _restore_optimizer(point, optimizer, moments)
        put_back(model, adapter)
        reasons = [
            *_other_versions(state.get("versions", {})),
            *restore_random_states(tensors[_RANDOM]),
        ]
        return Resumed(point, progress, best, state.get("plan"), reasons)
    return None


def _check_identity(point: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    found, wanted = _by_setting(found), _by_setting(wanted)
    differences = [
        f"{name.removeprefix('config.')} is {_said(found, name)} there, {_said(wanted, name)} here"
        for name in sorted({*found, *wanted})
        if found.get(name) != wanted.get(name)
    ]
    if differences:
        raise ResumePointError(
            f"The resume point {point.name} belongs to another run: {_listed(differences)}."
        )


def _by_setting(identity: dict[str, Any]) -> dict[str, Any]:
    """Lift out what a group of settings holds: a message about one of them names that one."""
    flat: dict[str, Any] = {}
    for name, value in identity.items():
        inner = _by_setting(value) if isinstance(value, dict) else None
        flat |= {name: value} if not inner else {f"{name}.{key}": one for key, one in inner.items()}
    return flat


def _said(settings: dict[str, Any], name: str) -> str:
    return shown(settings[name]) if name in settings else "not set"


def _listed(differences: list[str]) -> str:
    more = len(differences) - _TOLD
    return "; ".join(differences[:_TOLD]) + (f"; and {more} more" if more > 0 else "")


def _moments(optimizer: torch.optim.Optimizer) -> Weights:
    """Return the moments by ``<number of the parameter>.<name of the moment>``."""
    return {
        f"{index}.{name}": value
        for index, moments in optimizer.state_dict()["state"].items()
        for name, value in moments.items()
    }


def _restore_optimizer(point: Path, optimizer: torch.optim.Optimizer, saved: Weights) -> None:
    found, own = _kinds(saved), _kinds(_moments(optimizer))
    if found != own:
        differences = [
            f"{name} is {found.get(name, 'missing')} there, {own.get(name, 'missing')} here"
            for name in sorted({*found, *own}, key=lambda name: (int(name.partition(".")[0]), name))
            if found.get(name) != own.get(name)
        ]
        raise ResumePointError(
            f"The resume point {point.name} is of another optimizer: {_listed(differences)}."
        )
    state: dict[int, Weights] = {}
    for name, value in saved.items():
        index, _, moment = name.partition(".")
        state.setdefault(int(index), {})[moment] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _kinds(moments: Weights) -> dict[str, str]:
    return {name: _kind(value) for name, value in moments.items()}


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _other_versions(then: dict[str, Any]) -> list[str]:
    now = library_versions()
    return [
        f"{name} was {quoted(then.get(name) or 'not known')}, and is {now[name] or 'not known'} now."
        for name in now
        if then.get(name) != now[name]
    ]
