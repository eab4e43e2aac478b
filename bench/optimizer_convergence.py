"""What moments in 8 bits cost a fine-tune: QLoRA of tiny-llama with AdamW's moments in 32 bits, in 8, and in 8 and paged.

`.venv/bin/python -m bench.optimizer_convergence` trains all on the demo's questions about Python's standard library, with each of
several seeds (`bench.demo_finetunes`), so that the runs of a seed differ by the optimizer alone. It prints a table, keeps the
losses in `bench/results/` and, where all is as by default, draws them for `docs/`.
"""

import statistics
import sys
from functools import partial
from typing import Any

from bench.demo_finetunes import Bench, Form, run
from bench.loss_curves import draw
from bench.paired_losses import final_losses, mean_told
from bench.surroundings import ROOT

PICTURE = ROOT / "docs" / "formats" / "optimizer.png"
FORMS = (
    Form("adamw", "moments in 32 bits", "#0072b2", optimizer="adamw"),
    Form("adamw_8bit", "in 8 bits", "#d55e00", optimizer="adamw_8bit"),
    Form("paged_adamw_8bit", "in 8 bits, paged", "#009e73", optimizer="paged_adamw_8bit"),
)


def main() -> int:
    """Train what is missing, print, keep, draw."""
    picture = partial(
        draw, key="optimizer", forms=FORMS, title="less that of 32 bits, seed by seed"
    )
    return run(Bench("optimizer_convergence", __doc__, "optimizer", FORMS, table, picture, PICTURE))


def table(runs: list[dict[str, Any]]) -> str:
    """Say what each seed ended at, how far each form is from 32 bits, and how far the seeds are from each other."""
    finals = {form.name: final_losses(runs, "optimizer", form.name) for form in FORMS}
    lines = [_line("seed", *finals)]
    lines += [
        _line(seed, *(_told(losses.get(seed)) for losses in finals.values()))
        for seed in sorted({one["seed"] for one in runs})
    ]
    for what, of in (("mean", statistics.mean), ("standard deviation", statistics.stdev)):
        lines.append(
            _line(what, *(_told(of(o.values()) if len(o) > 1 else None) for o in finals.values()))
        )
    bytes_of = {one["optimizer"]: 4 * one["optimizer_bytes"] / one["adapter_bytes"] for one in runs}
    lines.append(_line("bytes per element", *(_told(bytes_of.get(name)) for name in finals)))
    full, *others = finals
    for name in others:
        seeds = sorted(finals[name].keys() & finals[full].keys())
        differences = [finals[name][seed] - finals[full][seed] for seed in seeds]
        lines += [f"{name} less {full}: {line}" for line in mean_told(differences)]
    return "\n".join(lines)


def _line(what: object, *cells: str) -> str:
    return "  ".join([f"{what:<18}", *(f"{cell:<16}" for cell in cells)]).rstrip()


def _told(number: float | None) -> str:
    return "" if number is None else f"{number:.4f}"


if __name__ == "__main__":
    sys.exit(main())
