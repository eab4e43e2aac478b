"""Fine-tunes tiny-llama on the demo's data in several forms and with several seeds, for benches that compare the forms' losses.

The runs of a seed see the same examples in the same order from the same start of the adapter, so that they differ by their form
alone. The loss is of questions about modules that neither the base model nor a run has seen. On a CPU all compute in float32, on one
thread. A run that the file of results has is not done again: a cut-off bench goes on.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.kept_file import OtherSettings, keep, open_kept
from bench.surroundings import RESULTS, ROOT, surroundings
from operations.demo.docstrings import DemoFiles, write_demo_files
from qlora_core import LoraConfig, TextEncoder, TrainConfig, load_dataset, load_model, train
from qlora_core.train import Event, StepMetrics, ValidationMetrics

_CONTEXT_LENGTH = 256


@dataclass(frozen=True)
class Form:
    """One of the ways to fine-tune that are compared.

    Attributes:
        name: in the table and in the file of results.
        in_words: in the picture.
        color: there.
        quantize: whether the base's weights are in NF4 with double quantization, or in 16 bits.
        optimizer: by name.
    """

    name: str
    in_words: str
    color: str
    quantize: bool = True
    optimizer: str = "adamw"


@dataclass(frozen=True)
class Bench:
    """What a bench that compares forms is made of.

    Attributes:
        name: of its file of results.
        about: what it says of itself.
        key: what a run's form is called in the file.
        forms: the others are compared with the first one.
        table: says what came of the runs.
        draw: draws what is kept into a file.
        picture: in docs/, drawn where all settings are as by default.
    """

    name: str
    about: str | None
    key: str
    forms: Sequence[Form]
    table: Callable[[list[dict[str, Any]]], str]
    draw: Callable[[dict[str, Any], Path], None]
    picture: Path


def run(bench: Bench) -> int:
    """Train what is missing, print, keep, draw; 2 where the file is of other settings."""
    arguments, is_whole = _arguments(bench.about)
    deadline = time.monotonic() + 60 * arguments.minutes
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    about = surroundings("torch", "transformers")
    file = arguments.file or RESULTS / f"{bench.name}-{arguments.device}-{about['commit']}.json"
    asked = {
        "model": arguments.model.name, "examples": arguments.examples, "validation": arguments.validation,
        "epochs": arguments.epochs, "rate": arguments.rate, "device": arguments.device,
        "versions": about["versions"],
    }  # fmt: skip
    try:
        kept = open_kept(file, about, asked)
    except OtherSettings as error:
        print(error, file=sys.stderr)
        return 2
    _train_missing(bench, arguments, kept, file, deadline)
    print(bench.table(kept["runs"]))
    print(f"Kept in {file}")
    picture = bench.picture if is_whole else arguments.picture
    if picture is not None:
        bench.draw(kept, picture)
        print(f"Drawn in {picture}")
    return 0


def _arguments(about: str | None) -> tuple[argparse.Namespace, bool]:
    """Give the arguments, and whether what is trained is as by default."""
    parser = argparse.ArgumentParser(description=about)
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
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no run after so many"
    )
    arguments = parser.parse_args()
    free = {"file": arguments.file, "picture": None, "minutes": arguments.minutes}
    return arguments, vars(arguments) == vars(parser.parse_args([])) | free


def _train_missing(
    bench: Bench, arguments: argparse.Namespace, kept: dict[str, Any], file: Path, deadline: float
) -> None:
    done = {(one[bench.key], one["seed"]) for one in kept["runs"]}
    with tempfile.TemporaryDirectory() as scratch:
        files = write_demo_files(
            Path(scratch), max_train=arguments.examples, max_validation=arguments.validation
        )
        for seed in arguments.seeds:
            for form in bench.forms:
                if (form.name, seed) in done:
                    continue
                if time.monotonic() > deadline:
                    print("The time is up. The same command goes on from here.")
                    return
                found = _finetune(arguments, files, form, seed, Path(scratch))
                kept["runs"].append({bench.key: form.name, "seed": seed} | found)
                keep(kept, file)


def _finetune(
    arguments: argparse.Namespace, files: DemoFiles, form: Form, seed: int, scratch: Path
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
        quantize=form.quantize,
    )
    config = TrainConfig(
        n_epochs=arguments.epochs, batch_size=8, learning_rate=arguments.rate, context_length=_CONTEXT_LENGTH, seed=seed,
        eval_steps=50, gradient_checkpointing=False, optimizer=form.optimizer, lora=LoraConfig(r=16, alpha=32),
    )  # fmt: skip
    losses: dict[int, float] = {}
    memory: dict[str, int] = {}

    def note(event: Event) -> None:
        if isinstance(event, ValidationMetrics):
            losses[event.step] = event.full_valid_loss
        elif isinstance(event, StepMetrics):
            memory.update(event.memory)

    train(model, encoder, training, config, note, output_dir=scratch / f"{form.name}-{seed}", validation=validation)  # fmt: skip
    took_s = time.perf_counter() - began
    final = losses[max(losses)]
    print(f"seed {seed}, {form.name}: {losses[0]:.4f} to {final:.4f} in {took_s:.0f} s", flush=True)
    return {"losses": losses, "took_s": took_s} | {
        name: memory[name] for name in ("adapter_bytes", "optimizer_bytes")
    }
