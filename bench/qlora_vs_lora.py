"""What four bits cost a fine-tune: LoRA over tiny-llama in NF4 with double quantization, and over the same weights in 16 bits.

`.venv/bin/python -m bench.qlora_vs_lora` trains both on the demo's questions about Python's standard library, with each of
several seeds (`bench.demo_finetunes`), so that two runs of a seed differ by the weights alone. It prints a table, keeps the
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

PICTURE = ROOT / "docs" / "formats" / "qlora-against-lora.png"
FORMS = (
    Form("16-bit", "LoRA over 16 bits", "#0072b2", quantize=False),
    Form("NF4+DQ", "QLoRA over NF4 with double quantization", "#d55e00"),
)


def main() -> int:
    """Train what is missing, print, keep, draw."""
    picture = partial(draw, key="base", forms=FORMS, title="QLoRA less LoRA, seed by seed")
    return run(Bench("qlora_vs_lora", __doc__, "base", FORMS, table, picture, PICTURE))


def table(runs: list[dict[str, Any]]) -> str:
    """Say what each seed ended at, and the differences' mean with its spread."""
    dense, quantized = (final_losses(runs, "base", form.name) for form in FORMS)
    seeds = sorted(dense.keys() & quantized.keys())
    differences = [quantized[seed] - dense[seed] for seed in seeds]
    lines = ["seed   16-bit LoRA   QLoRA (NF4+DQ)   difference"]
    lines += [
        f"{seed:<6} {dense[seed]:<13.4f} {quantized[seed]:<16.4f} {difference:+.4f}"
        for seed, difference in zip(seeds, differences, strict=True)
    ]
    start = {one["base"]: next(iter(one["losses"].values())) for one in runs}
    if len(start) == len(FORMS):
        before = start["NF4+DQ"] - start["16-bit"]
        lines.append(
            f"before {start['16-bit']:<13.4f} {start['NF4+DQ']:<16.4f} {before:+.4f}   (no adapter)"
        )
    lines += mean_told(differences)
    if len(seeds) > 1:
        between = statistics.stdev(dense[seed] for seed in seeds)
        lines.append(f"for comparison, between the seeds of 16-bit LoRA: {between:.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
