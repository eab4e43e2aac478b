"""Takes a run to where it stopped, and says what is not as it was there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_core.errors import ConfigError
from qlora_core.train.events import Notice, ResumeNotExact
from qlora_core.train.plan import ExecutionPlan
from qlora_core.train.progress import Progress
from qlora_core.train.resume.files import set_aside
from qlora_core.train.resume.points import load_resume_point
from qlora_core.train.run import Run
from qlora_core.train.saving import resume_points
from qlora_core.whole_folder import put_back_replaced


def resume(run: Run, resume_from: Path | None) -> Progress:
    """Go to the newest whole resume point, or to the beginning.

    Raises:
        ResumePointError: the newest whole one belongs to another run.
    """
    if resume_from is None:
        return Progress()
    # What is in another folder is not this run's to move.
    own = resume_points(run).resolve()
    if resume_from.resolve() == own:
        put_back_replaced(own)
    refused: list[Path] = []

    def on_refused(point: Path, reason: str) -> None:
        run.sink(Notice("warn", reason))
        refused.append(point)

    found = load_resume_point(
        resume_from,
        model=run.model,
        optimizer=run.optimizer,
        identity=run.identity,
        on_refused=on_refused,
        can_be=run.can_be_at,
    )
    for point in refused:
        if point.parent.resolve() == own:
            set_aside(point)
    if found is None:
        run.sink(Notice("warn", f"There is no whole resume point in {resume_from}: starting anew."))
        return Progress()
    run.best = found.best
    reasons = found.reasons + _follow(run, found.plan)
    if reasons:
        run.sink(ResumeNotExact(found.progress.step, reasons))
    return found.progress


def _follow(run: Run, plan: Mapping[str, Any] | None) -> list[str]:
    if plan is None:
        return ["The resume point does not say by which plan its steps were computed."]
    try:
        known = ExecutionPlan.from_dict(plan)
    except ConfigError as error:
        return [f"The plan of its steps cannot be followed: {error.message}."]
    return run.follow(known)
