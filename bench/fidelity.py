"""What each storage format costs in quality: perplexity of tiny-llama on text it never saw, and its weights' error.

`.venv/bin/python -m bench.fidelity` prints tables and keeps them in `bench/results/`. The same layers are quantized that
`load_model` quantizes; everything is computed in float32. docs/formats/comparison.md says how to read them.
"""

import argparse
import hashlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.fidelity_measuring import (
    MODEL,
    WINDOW_TOKENS,
    Row,
    costs_in_ms,
    gains_by_kind,
    held_out_text,
    measure,
    quantized_weights,
)
from bench.surroundings import RESULTS, surroundings

WIDTH = 120


def main() -> int:
    """Measure every format, print the tables, keep them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tokens", type=int, default=60_000, help="of held-out text (%(default)s; all: 237319)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the result")
    options = parser.parse_args()
    if options.tokens <= WINDOW_TOKENS:
        parser.error(f"--tokens must be more than {WINDOW_TOKENS}")
    began = time.monotonic()
    text = held_out_text()[: options.tokens]
    weights = quantized_weights()
    rows = measure(weights, text)
    gains, costs = gains_by_kind(weights), costs_in_ms()
    print_rows(rows, len(text))
    print_gains(gains)
    told = ", ".join(f"{name} {ms:.0f} ms" for name, ms in costs.items())
    print(f"Quantizing 4096 x 4096 in bfloat16 with {torch.get_num_threads()} threads: {told}.")
    file = keep(rows, gains, costs, len(text), options.results)
    print(f"{time.monotonic() - began:.0f} s. Kept in {file}")
    return 0


def print_rows(rows: list[Row], n_tokens: int) -> None:
    """Print a line for each format."""
    table = Table(title=f"tiny-llama on {n_tokens:,} held-out tokens", box=box.SIMPLE)
    table.add_column("format", no_wrap=True)
    titles = ("bits", "MSE", "SQNR dB", "perplexity", "loss added", "divergence", "paper's ppl")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.bits_per_parameter:.3f}",
            f"{row.mean_squared_error:.2e}",
            "" if row.sqnr_db is None else f"{row.sqnr_db:.2f}",
            f"{row.perplexity:.3f}",
            f"{row.loss_added:.5f} ± {row.loss_added_standard_error:.5f}",
            f"{row.divergence:.5f} ± {row.divergence_standard_error:.5f}",
            "" if row.paper_perplexity is None else f"{row.paper_perplexity:.2f}",
        )
    Console(width=WIDTH).print(table)


def print_gains(gains: dict[str, dict[str, float]]) -> None:
    """Print how much of its squared error each kind of layer loses."""
    table = Table(title='squared error that scale="mse" removes', box=box.SIMPLE)
    table.add_column("layer")
    for name in ("NF4", "NF4+DQ"):
        table.add_column(name, justify="right")
    for kind, of in gains.items():
        table.add_row(kind, *(f"{gain:.1%}" for gain in of.values()))
    Console(width=WIDTH).print(table)


def keep(
    rows: list[Row],
    gains: dict[str, dict[str, float]],
    costs: dict[str, float],
    n_tokens: int,
    folder: Path,
) -> Path:
    """Write everything to a file of this commit and return it."""
    about = surroundings("torch", "transformers")
    weights = (MODEL / "model.safetensors").read_bytes()
    content: dict[str, Any] = {
        "command": "python -m bench.fidelity",
        "commit": about["commit"],
        "model": "tiny-llama",
        "model_sha256": hashlib.sha256(weights).hexdigest(),
        "held_out_tokens": n_tokens,
        "window_tokens": WINDOW_TOKENS,
        "versions": about["versions"],
        "rows": [asdict(row) for row in rows],
        "squared_error_removed_by_mse": gains,
        "quantize_4096_4096_bfloat16_ms": costs,
        "threads": torch.get_num_threads(),
    }
    file = folder / f"fidelity-cpu-{about['commit']}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")
    return file


if __name__ == "__main__":
    sys.exit(main())
