"""The picture of a run: training loss, raw and smoothed, and validation loss over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_core.commands.history import History

_SMOOTHED_OVER = 20
"""The smoothed line forgets over a twentieth of the steps."""


def draw_loss_curve(history: History, path: Path) -> bool:
    """Draw a run's losses as a PNG.

    Returns:
        Whether there is one now; False where matplotlib is not installed, or no step has a loss.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    if not history.train:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    steps = sorted(history.train)
    raw = [history.train[step] for step in steps]
    axes.plot(steps, raw, color="tab:blue", alpha=0.3, linewidth=1, label="training, each step")
    axes.plot(steps, smoothed(raw), color="tab:blue", linewidth=2, label="training, smoothed")
    _draw_validation(axes, history.validation)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per trained token)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        figure.savefig(unfinished, format="png")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return True


def smoothed(values: Sequence[float]) -> list[float]:
    """Give exponentially weighted means of the values up to each; early ones are not pulled towards zero."""
    keep = 1 - 1 / max(1.0, len(values) / _SMOOTHED_OVER)
    means: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight)
    return means


def _draw_validation(axes: object, losses: Mapping[int, float]) -> None:
    if losses:
        steps = sorted(losses)
        found = [losses[step] for step in steps]
        axes.plot(steps, found, color="tab:orange", marker="o", linewidth=2, label="validation")  # type: ignore[attr-defined]
