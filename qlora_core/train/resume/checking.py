"""What a resume point says, held to what can be: a sum that fits shows that a file is whole, not who has written it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from qlora_core.errors import ResumePointError
from qlora_core.quoting import quoted
from qlora_core.train.progress import Progress
from qlora_core.train.resume.random_states import check_random_states
from qlora_core.train.weights import Weights, trained_weights
from qlora_core.typed_values import wrong_fields

_MOMENT = re.compile(r"[0-9]{1,9}\.[a-z_0-9]+")


def checked_state(point: Path, state: Mapping[str, Any]) -> Progress:
    """Give the progress in a point's state, all of whose parts are of their kinds.

    Raises:
        ResumePointError: it is of another version of the engine; a point before it would be, too.
        ValueError: a part is not of its kind, or cannot be; the message ends a sentence.
    """
    _table(state, "identity")
    versions = _table(state, "versions")
    if not all(one is None or isinstance(one, str) for one in versions.values()):
        raise ValueError("its versions are none")
    if state.get("plan") is not None:
        _table(state, "plan")
    return _checked_progress(point, _table(state, "progress"))


def _table(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = state.get(name)
    if not isinstance(value, dict):
        raise ValueError(f"its {name} is no table")  # noqa: TRY004 - the file's fault, not the caller's
    return value


def _checked_progress(point: Path, values: dict[str, Any]) -> Progress:
    unlike = sorted(values.keys() ^ {field.name for field in fields(Progress)})
    if unlike:
        names = quoted(", ".join(unlike))
        raise ResumePointError(
            f"The resume point {point.name} is of another version of the engine: {names}."
        )
    wrong = wrong_fields(Progress, values)
    wrong += [name for name, value in values.items() if type(value) is int and value < 0]
    if wrong:
        raise ValueError(f"its {', '.join(wrong)} cannot be")
    progress = Progress(**values)
    number = re.fullmatch(r"step-([0-9]+)", point.name)
    if number is not None and int(number[1]) != progress.step:
        raise ValueError(f"it says that it is of step {progress.step}")
    if progress.step < max(progress.epoch, progress.window, progress.best_step or 0):
        raise ValueError("its figures do not agree with its step")
    return progress


def check_place(progress: Progress, can_be: Callable[[Progress], bool]) -> None:
    """Refuse a place that the run can never have been at.

    Raises:
        ValueError: the message ends a sentence.
    """
    if not can_be(progress):
        raise ValueError("no step of this run ends where it says")


def check_tensors(model: nn.Module, moments: Weights, random: Weights, *adapters: Weights) -> None:
    """Refuse what cannot be this run's although names and shapes fit; nothing is changed.

    Raises:
        ValueError: the message ends a sentence.
    """
    unknown = [name for name in moments if not _MOMENT.fullmatch(name)]
    if unknown:
        raise ValueError("its optimizer holds what is no moment of a parameter")
    own = trained_weights(model)
    for name, value in (one for adapter in adapters for one in adapter.items()):
        if value.dtype != own[name].dtype:
            raise ValueError("its adapter is of another dtype than the run's")
    check_random_states(random)
