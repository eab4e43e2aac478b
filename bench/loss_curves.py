"""Draws the validation losses of fine-tunes in several forms, and how far they are from the first form's, seed by seed."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.demo_finetunes import Form

Curve = dict[int, float]


def draw(kept: dict[str, Any], file: Path, *, key: str, forms: Sequence[Form], title: str) -> None:
    """Write a PNG of two panels: losses by step, and the other forms' less the first one's.

    Args:
        kept: what a bench keeps: ``runs`` of a form, a seed and the losses by step.
        file: of the picture.
        key: what a run's form is called.
        forms: in the order in which they are drawn; the later ones lie upon the others.
        title: of the second panel.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, differences = figure.subplots(1, 2)
    curves = {(run[key], run["seed"]): _by_step(run) for run in kept["runs"]}
    for form in forms:
        for number, curve in enumerate(c for (of, _), c in curves.items() if of == form.name):
            label = form.in_words if number == 0 else None
            losses.plot(
                list(curve), list(curve.values()), color=form.color, linewidth=1, label=label
            )
    losses.set(
        title=f"{kept['model']}, {kept['examples']} examples, epochs: {kept['epochs']}",
        xlabel="optimizer step",
        ylabel="validation loss, nats per token",
    )
    losses.legend()

    first, *others = forms
    # One other form needs no color to be told from the rest.
    colors = ["black"] if len(others) == 1 else [form.color for form in others]
    for form, color in zip(others, colors, strict=True):
        pairs = _differences(curves, form.name, first.name)
        _draw_pairs(differences, pairs, color, "" if len(others) == 1 else f", {form.name}")
    differences.axhline(0, color="0.3", linewidth=0.8, linestyle="--")
    differences.set(title=title, xlabel="optimizer step", ylabel="nats per token")
    file.parent.mkdir(parents=True, exist_ok=True)
    # Without the library's version in it, the same figures give the same file.
    figure.savefig(file, dpi=100, metadata={"Software": None})


def _draw_pairs(axes: Axes, pairs: list[Curve], color: str, of: str) -> None:
    """Draw each seed's difference thin, and their mean."""
    for number, pair in enumerate(pairs):
        thin, alpha = ("0.6", 1.0) if color == "black" else (color, 0.4)
        label = f"one seed{of}" if number == 0 else None
        axes.plot(
            list(pair), list(pair.values()), color=thin, alpha=alpha, linewidth=1, label=label
        )
    if pairs:
        steps = list(pairs[0])
        means = [statistics.mean(pair[step] for pair in pairs) for step in steps]
        axes.plot(steps, means, color=color, linewidth=2, label=f"mean{of}")
        axes.legend()


def _by_step(run: dict[str, Any]) -> Curve:
    return {int(step): loss for step, loss in run["losses"].items()}


def _differences(curves: dict[tuple[str, int], Curve], form: str, first: str) -> list[Curve]:
    """Give the differences of a form from the first one, of each seed that both have."""
    seeds = sorted({seed for of, seed in curves if of == form and (first, seed) in curves})
    return [
        {step: curves[form, seed][step] - loss for step, loss in curves[first, seed].items()}
        for seed in seeds
    ]
