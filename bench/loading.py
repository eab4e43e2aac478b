"""What loading a model into NF4 costs on the CPU, in memory and time, beside transformers with bitsandbytes.

`.venv/bin/python -m bench.loading` makes a random model of about 300 million parameters in a temporary folder, prints a
table and keeps it in `bench/results/`; then the same for a mixture that is stored expert by expert, which only ours puts
into NF4. Each load is a process of its own, the contenders take turns, and a figure is the
median of them. Memory is what `/proc` says of the process from outside, every millisecond, above what it held after
its imports: anonymous pages (RssAnon) and pages of mapped files (RssFile; dense tensors that transformers need not cast stay such
pages in its result). Each line says how far the worst load is from the result and two of the largest tensor; ours is held
to that and an amount that does not grow with the model.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.surroundings import RESULTS, surroundings
from bench.watching import ProcessEnded, watch

CONTENDERS = ("ours", "bitsandbytes")
# The quantizer's tables and working memory of two threads, Python's objects, the allocator's rests.
FIXED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Load:
    """One load in a process of its own; memory in bytes, above what the imports took."""

    seconds: float
    anonymous: int
    mapped: int
    resident: int  # the peak of both together
    result: int


def main() -> int:
    """Measure, print, keep; 1 where ours breaks its promise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=20, help="about 13 million parameters each")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each contender")
    parser.add_argument("--width", type=int, default=1024, help="hidden size, a multiple of 64")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the result")
    arguments = parser.parse_args()

    about = surroundings("torch", "transformers", "bitsandbytes")
    print(f"{about['cpu']}, {about['cpus']} CPUs, load {about['load']:.1f}; {about['versions']}")
    size = (arguments.layers, arguments.width)
    try:
        models = [
            compare("llama", *size, CONTENDERS, arguments.rounds),
            compare("mixtral", *size, ("ours",), arguments.rounds),
        ]
    except ProcessEnded as error:
        print(error, file=sys.stderr)
        return 1
    file = arguments.results / f"loading-cpu-{about['commit']}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(about | {"models": models}, indent=1) + "\n")
    print(f"Kept in {file}")
    return 0 if all(one["rows"][0]["promise_kept"] for one in models) else 1


def compare(
    kind: str, layers: int, width: int, contenders: Sequence[str], rounds: int
) -> dict[str, Any]:
    """Measure the contenders' loads of a model in turns; print and give what came of it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = make_model(folder, kind, layers, width)
        print(
            "{kind}: {parameters:,} parameters, {shards} shards of {mib:.0f} MiB in all".format(
                **model
            )
        )
        found: dict[str, list[Load]] = {contender: [] for contender in contenders}
        for turn in range(rounds):
            for contender in contenders if turn % 2 == 0 else reversed(contenders):
                found[contender].append(measure(contender, folder))
    rows = [_row(contender, loads, model["largest_bytes"]) for contender, loads in found.items()]
    for row in rows:
        print(_line(row))
    return model | {"rows": rows}


def make_model(folder: Path, kind: str, layers: int, width: int) -> dict[str, Any]:
    """Save a random model in bfloat16, in shards; tell its sizes."""
    import torch
    from transformers import AutoModelForCausalLM

    from qlora_core.models.files import find_weights

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(kind, layers, width), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="200MB")
    places = find_weights(folder).places.values()
    return {
        "kind": kind,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "shards": len({place.path for place in places}),
        "mib": sum(place.nbytes for place in places) / 2**20,
        "largest_bytes": max(place.nbytes for place in places),
    }


def _config(kind: str, layers: int, width: int) -> Any:  # noqa: ANN401 - transformers is imported here only
    from transformers import LlamaConfig, MixtralConfig

    if kind == "mixtral":
        # As many parameters in a fifth as many layers; a small vocabulary, so that one expert's matrix is the largest tensor.
        return MixtralConfig(
            vocab_size=2_000 * width // 1024,
            hidden_size=width,
            intermediate_size=11 * width // 4,
            num_hidden_layers=max(1, layers // 5),
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            num_local_experts=8,
        )
    return LlamaConfig(
        vocab_size=32_000 * width // 1024,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=False,
    )


def measure(contender: str, folder: Path) -> Load:
    """Load the model in a new process, and watch its memory from here.

    Raises:
        ProcessEnded: the load has failed.
    """
    watched = watch([sys.executable, "-m", "bench.loading_process", contender, folder])
    return Load(
        seconds=watched.told["seconds"],
        anonymous=watched.above["RssAnon"],
        mapped=watched.above["RssFile"],
        resident=watched.above["together"],
        result=watched.told["result_bytes"],
    )


def _row(contender: str, loads: list[Load], largest: int) -> dict[str, Any]:
    # The worst load, not the median, has to keep the promise.
    two_tensors = loads[0].result + 2 * largest
    worst = max(one.anonymous for one in loads)
    return {
        "contender": contender,
        "seconds": statistics.median(one.seconds for one in loads),
        "anonymous_bytes": statistics.median(one.anonymous for one in loads),
        "mapped_bytes": statistics.median(one.mapped for one in loads),
        "resident_bytes": statistics.median(one.resident for one in loads),
        "result_bytes": loads[0].result,
        "worst_bytes": worst,
        "two_tensors_bytes": two_tensors,
        "promise_kept": worst <= two_tensors + FIXED_BYTES,
        "loads": [vars(one) for one in loads],
    }


def _line(row: dict[str, Any]) -> str:
    mib = {
        name.removesuffix("_bytes"): size / 2**20
        for name, size in row.items()
        if name.endswith("_bytes")
    }
    beyond = mib["worst"] - mib["two_tensors"]
    return (
        f"  {row['contender']:12}  {row['seconds']:6.2f} s   at the peak anonymous {mib['anonymous']:6.1f} MiB, "
        f"mapped {mib['mapped']:6.1f} MiB, together {mib['resident']:6.1f} MiB; result {mib['result']:.1f} MiB; "
        f"the worst load's anonymous peak is {beyond:+.1f} MiB from result and two of the largest tensor, "
        f"{mib['two_tensors']:.1f} MiB"
    )


if __name__ == "__main__":
    sys.exit(main())
