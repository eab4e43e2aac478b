"""What the final losses of several forms of a fine-tune say, seed by seed."""

import statistics
from typing import Any

# Student's, for 95% of both sides together, by degrees of freedom.
_T95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def final_losses(runs: list[dict[str, Any]], key: str, form: str) -> dict[int, float]:
    """Return the loss of the whole validation set after the last step, by seed."""
    return {run["seed"]: list(run["losses"].values())[-1] for run in runs if run[key] == form}


def mean_told(differences: list[float]) -> list[str]:
    """Say what two seeds' differences and more are in the mean; nothing of a single one."""
    if len(differences) < 2:
        return []
    mean, spread = statistics.mean(differences), statistics.stdev(differences)
    lines = [f"mean difference {mean:+.4f} nats per token, standard deviation {spread:.4f}"]
    if len(differences) - 1 in _T95:
        around = _T95[len(differences) - 1] * spread / len(differences) ** 0.5
        lines.append(f"95% of the mean: {mean - around:+.4f} to {mean + around:+.4f}")
    return lines
