"""What loading a model into NF4 costs on the CPU, in memory and time, beside transformers with bitsandbytes.

`.venv/bin/python -m bench.loading` makes a random model of about 300 million parameters in a temporary folder, prints a
table and keeps it in `bench/results/`; then the same for a mixture that is stored expert by expert, which only ours puts
into NF4. Each load is a process of its own, the contenders take turns, and a figure is the
median of them. Memory is what `/proc` says of the process from outside, every millisecond, above what it held after
its imports: anonymous pages (RssAnon) and pages of mapped files (RssFile; dense tensors that transformers need not cast stay such
pages in its result). The promise that ours is held to: no more
anonymous memory than the result, two of the largest tensor, and an amount that does not grow with the model.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
CONTENDERS = ("ours", "bitsandbytes")
KINDS = ("RssAnon", "RssFile")
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
    parser.add_argument("--keep", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()

    about = _about()
    print(f"{about['cpu']}, {about['cpus']} CPUs, load {about['load']:.1f}; {about['versions']}")
    models = [
        compare("llama", arguments.layers, CONTENDERS, arguments.rounds),
        compare("mixtral", arguments.layers, ("ours",), arguments.rounds),
    ]
    if arguments.keep:
        RESULTS.mkdir(parents=True, exist_ok=True)
        file = RESULTS / f"loading-cpu-{about['commit']}.json"
        file.write_text(json.dumps(about | {"models": models}, indent=1) + "\n")
        print(f"Kept in {file.relative_to(ROOT)}")
    return 0 if all(one["rows"][0]["promise_kept"] for one in models) else 1


def compare(kind: str, layers: int, contenders: Sequence[str], rounds: int) -> dict[str, Any]:
    """Measure the contenders' loads of a model in turns; print and give what came of it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = make_model(folder, kind, layers)
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


def make_model(folder: Path, kind: str, layers: int) -> dict[str, Any]:
    """Save a random model in bfloat16, in shards; tell its sizes."""
    import torch
    from transformers import AutoModelForCausalLM

    from qlora_core.models.files import find_weights

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(kind, layers), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="200MB")
    places = find_weights(folder).places.values()
    return {
        "kind": kind,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "shards": len({place.path for place in places}),
        "mib": sum(place.nbytes for place in places) / 2**20,
        "largest_bytes": max(place.nbytes for place in places),
    }


def _config(kind: str, layers: int) -> Any:  # noqa: ANN401 - transformers is imported here only
    from transformers import LlamaConfig, MixtralConfig

    if kind == "mixtral":
        # As many parameters in a fifth as many layers; a small vocabulary, so that one expert's matrix is the largest tensor.
        return MixtralConfig(
            vocab_size=2_000,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=max(1, layers // 5),
            num_attention_heads=16,
            num_key_value_heads=16,
            num_local_experts=8,
        )
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=False,
    )


def measure(contender: str, folder: Path) -> Load:
    """Load the model in a new process, and watch its memory from here."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.loading_process", contender, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None  # noqa: S101 - pipes, as asked for
    assert process.stdout is not None  # noqa: S101
    with process:
        if "ready" not in process.stdout.readline():
            raise SystemExit(f"{contender} cannot be measured here")
        before = memory_of(process.pid)
        os.set_blocking(process.stdout.fileno(), False)
        process.stdin.write("go\n")
        process.stdin.flush()
        peak, line = dict(before), ""
        while not line and process.poll() is None:
            now = memory_of(process.pid)
            peak = {kind: max(peak[kind], now[kind]) for kind in peak}
            line = process.stdout.readline()
            time.sleep(0.001)
        told = json.loads(line)
        process.stdin.write("end\n")
        process.stdin.close()
    above = {kind: peak[kind] - before[kind] for kind in peak}
    return Load(
        seconds=told["seconds"],
        anonymous=above["RssAnon"],
        mapped=above["RssFile"],
        resident=above["together"],
        result=told["result_bytes"],
    )


def memory_of(pid: int) -> dict[str, int]:
    """Give a process's resident bytes by kind, and together."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    sizes = {kind: int(fields[kind].split()[0]) * 1024 for kind in KINDS}
    return sizes | {"together": sum(sizes.values())}


def _row(contender: str, loads: list[Load], largest: int) -> dict[str, Any]:
    # The worst load, not the median, has to keep the promise.
    allowed = loads[0].result + 2 * largest + FIXED_BYTES
    return {
        "contender": contender,
        "seconds": statistics.median(one.seconds for one in loads),
        "anonymous_bytes": statistics.median(one.anonymous for one in loads),
        "mapped_bytes": statistics.median(one.mapped for one in loads),
        "resident_bytes": statistics.median(one.resident for one in loads),
        "result_bytes": loads[0].result,
        "allowed_bytes": allowed,
        "promise_kept": max(one.anonymous for one in loads) <= allowed,
        "loads": [vars(one) for one in loads],
    }


def _line(row: dict[str, Any]) -> str:
    mib = {
        name.removesuffix("_bytes"): size / 2**20
        for name, size in row.items()
        if name.endswith("_bytes")
    }
    kept = "within" if row["promise_kept"] else "beyond"
    return (
        f"  {row['contender']:12}  {row['seconds']:6.2f} s   at the peak anonymous {mib['anonymous']:6.1f} MiB, "
        f"mapped {mib['mapped']:6.1f} MiB, together {mib['resident']:6.1f} MiB; result {mib['result']:.1f} MiB; "
        f"each load's anonymous peak {kept} {mib['allowed']:.1f} MiB"
    )


def _about() -> dict[str, Any]:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "cpu": names[0] if names else platform.processor(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "commit": commit.stdout.strip() or "unknown",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "bitsandbytes")},
    }


if __name__ == "__main__":
    sys.exit(main())
