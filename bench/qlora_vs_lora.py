"""What four bits cost a fine-tune: LoRA over tiny-llama in NF4 with double quantization, and over the same weights in 16 bits.

`.venv/bin/python -m bench.qlora_vs_lora` trains both on the demo's questions about Python's standard library, with each of
several seeds, and measures the loss on questions about modules that neither the base model nor a run has seen. Two runs of a
seed see the same examples in the same order from the same start of the adapter, so their difference is the weights' alone. It prints a table, keeps the
losses in `bench/results/` and, where all is as by default, draws them for `docs/`. A run that the file has is not done again: a cut-off bench goes on.
On a CPU both compute in float32, on one thread.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.qlora_vs_lora_picture import draw
from bench.surroundings import RESULTS, ROOT, surroundings
from operations.demo.docstrings import DemoFiles, write_demo_files
from qlora_core import LoraConfig, TextEncoder, TrainConfig, load_dataset, load_model, train
from qlora_core.train import Event, ValidationMetrics

PICTURE = ROOT / "docs" / "formats" / "qlora-against-lora.png"
BASES = ("16-bit", "NF4+DQ")
_CONTEXT_LENGTH = 256
# Student's, for 95% of both sides together, by degrees of freedom.
_T95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def main() -> int:
    """Train what is missing, print, keep, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny-llama")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--examples", type=int, default=1600, help="to train on")
    parser.add_argument("--validation", type=int, default=200, help="examples to validate on")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1e-3, help="the highest learning rate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--file", type=Path, help="of the results; one for this commit if not given"
    )
    parser.add_argument(
        "--picture",
        type=Path,
        help="to draw; that of docs/ if not given and what is trained is as by default",
    )
    arguments = parser.parse_args()
    whole = vars(parser.parse_args([])) | {"file": arguments.file, "picture": None}
    picture = PICTURE if vars(arguments) == whole else arguments.picture
    about = surroundings("torch", "transformers")

    if arguments.device == "cpu":
        torch.set_num_threads(1)
    file = arguments.file or RESULTS / f"qlora_vs_lora-{arguments.device}-{about['commit']}.json"
    kept = json.loads(file.read_text()) if file.exists() else {"runs": []}
    asked = {
        "model": arguments.model.name, "examples": arguments.examples, "validation": arguments.validation,
        "epochs": arguments.epochs, "rate": arguments.rate, "device": arguments.device,
        "versions": about["versions"],
    }  # fmt: skip
    if {name: kept.get(name, value) for name, value in asked.items()} != asked:
        print(f"{file} is of other settings", file=sys.stderr)
        return 2
    kept = about | kept | asked
    done = {(run["base"], run["seed"]) for run in kept["runs"]}
    with tempfile.TemporaryDirectory() as scratch:
        files = write_demo_files(
            Path(scratch), max_train=arguments.examples, max_validation=arguments.validation
        )
        for seed in arguments.seeds:
            for base in BASES:
                if (base, seed) not in done:
                    kept["runs"].append(_run(arguments, files, base, seed, Path(scratch)))
                    _keep(kept, file)
    print(table(kept["runs"]))
    print(f"Kept in {file}")
    if picture is not None:
        draw(kept, picture)
        print(f"Drawn in {picture}")
    return 0


def _keep(kept: dict[str, Any], file: Path) -> None:
    """Write beside the file and rename: a bench that is cut off leaves what it had."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    beside.write_text(json.dumps(kept) + "\n")
    beside.replace(file)


def _run(
    arguments: argparse.Namespace, files: DemoFiles, base: str, seed: int, scratch: Path
) -> dict[str, Any]:
    """Train once; the validation losses by step, from the untrained adapter's on."""
    began = time.perf_counter()
    encoder = TextEncoder.from_folder(arguments.model, now=0.0)
    training, validation = (
        load_dataset(path, encoder, context_length=_CONTEXT_LENGTH)
        for path in (files.train, files.validation)
    )
    model = load_model(
        arguments.model,
        device=arguments.device,
        compute_dtype=torch.float32 if arguments.device == "cpu" else torch.bfloat16,
        quantize=base == "NF4+DQ",
    )
    config = TrainConfig(
        n_epochs=arguments.epochs, batch_size=8, learning_rate=arguments.rate, context_length=_CONTEXT_LENGTH, seed=seed,
        eval_steps=50, gradient_checkpointing=False, lora=LoraConfig(r=16, alpha=32),
    )  # fmt: skip
    losses: dict[int, float] = {}

    def note(event: Event) -> None:
        if isinstance(event, ValidationMetrics):
            losses[event.step] = event.full_valid_loss

    train(model, encoder, training, config, note, output_dir=scratch / f"{base}-{seed}", validation=validation)  # fmt: skip
    took_s = time.perf_counter() - began
    final = losses[max(losses)]
    print(f"seed {seed}, {base}: {losses[0]:.4f} to {final:.4f} in {took_s:.0f} s", flush=True)
    return {"base": base, "seed": seed, "losses": losses, "took_s": took_s}


def final_losses(runs: list[dict[str, Any]], base: str) -> dict[int, float]:
    """Return the loss of the whole validation set after the last step, by seed."""
    return {run["seed"]: list(run["losses"].values())[-1] for run in runs if run["base"] == base}


def table(runs: list[dict[str, Any]]) -> str:
    """Say what each seed ended at, and the differences' mean with its spread."""
    dense, quantized = (final_losses(runs, base) for base in BASES)
    seeds = sorted(dense.keys() & quantized.keys())
    differences = [quantized[seed] - dense[seed] for seed in seeds]
    lines = ["seed   16-bit LoRA   QLoRA (NF4+DQ)   difference"]
    lines += [
        f"{seed:<6} {dense[seed]:<13.4f} {quantized[seed]:<16.4f} {difference:+.4f}"
        for seed, difference in zip(seeds, differences, strict=True)
    ]
    start = {run["base"]: next(iter(run["losses"].values())) for run in runs}
    if len(start) == len(BASES):
        before = start["NF4+DQ"] - start["16-bit"]
        lines.append(
            f"before {start['16-bit']:<13.4f} {start['NF4+DQ']:<16.4f} {before:+.4f}   (no adapter)"
        )
    if len(seeds) > 1:
        mean, spread = statistics.mean(differences), statistics.stdev(differences)
        lines.append(f"mean difference {mean:+.4f} nats per token, standard deviation {spread:.4f}")
        if len(seeds) - 1 in _T95:
            around = _T95[len(seeds) - 1] * spread / len(seeds) ** 0.5
            lines.append(f"95% of the mean: {mean - around:+.4f} to {mean + around:+.4f}")
        between = statistics.stdev(dense[seed] for seed in seeds)
        lines.append(f"for comparison, between the seeds of 16-bit LoRA: {between:.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
