"""Draws what `bench.qlora_vs_lora` measured: the validation losses, and their difference seed by seed."""

import statistics
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_COLORS = {"16-bit": "#0072b2", "NF4+DQ": "#d55e00"}
_NAMES = {"16-bit": "LoRA over 16 bits", "NF4+DQ": "QLoRA over NF4 with double quantization"}


def draw(kept: dict[str, Any], file: Path) -> None:
    """Write a PNG of two panels: losses by step, and QLoRA's less LoRA's.

    Args:
        kept: what the bench keeps: ``runs`` of a base, a seed and the losses by step.
        file: of the picture.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, differences = figure.subplots(1, 2)
    curves = {(run["base"], run["seed"]): _by_step(run) for run in kept["runs"]}
    for base, color in _COLORS.items():
        for number, curve in enumerate(c for (of, _), c in curves.items() if of == base):
            label = _NAMES[base] if number == 0 else None
            losses.plot(list(curve), list(curve.values()), color=color, linewidth=1, label=label)
    losses.set(
        title=f"{kept['model']}, {kept['examples']} examples, epochs: {kept['epochs']}",
        xlabel="optimizer step",
        ylabel="validation loss, nats per token",
    )
    losses.legend()

    seeds = sorted({seed for _, seed in curves})
    pairs = [_difference(curves, seed) for seed in seeds if _is_pair(curves, seed)]
    for number, pair in enumerate(pairs):
        label = "one seed" if number == 0 else None
        differences.plot(list(pair), list(pair.values()), color="0.6", linewidth=1, label=label)
    if pairs:
        steps = list(pairs[0])
        means = [statistics.mean(pair[step] for pair in pairs) for step in steps]
        differences.plot(steps, means, color="black", linewidth=2, label="mean")
        differences.legend()
    differences.axhline(0, color="0.3", linewidth=0.8, linestyle="--")
    differences.set(
        title="QLoRA less LoRA, seed by seed", xlabel="optimizer step", ylabel="nats per token"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    # Without the library's version in it, the same figures give the same file.
    figure.savefig(file, dpi=100, metadata={"Software": None})


def _by_step(run: dict[str, Any]) -> dict[int, float]:
    return {int(step): loss for step, loss in run["losses"].items()}


def _is_pair(curves: dict[tuple[str, int], dict[int, float]], seed: int) -> bool:
    return all((base, seed) in curves for base in _COLORS)


def _difference(curves: dict[tuple[str, int], dict[int, float]], seed: int) -> dict[int, float]:
    dense, quantized = (curves[base, seed] for base in _COLORS)
    return {step: quantized[step] - dense[step] for step in dense}
