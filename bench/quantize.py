"""NF4 on the CPU beside bitsandbytes: how long quantizing and dequantizing take, and how much memory.

`.venv/bin/python -m bench.quantize` prints a table and keeps it in `bench/results/`; `--quick` takes less than a minute
and keeps nothing. Every measurement is a process of its own, the contenders take turns (A B B A A B), and a figure is the
median of the processes' medians. Other work on the machine shows in the range.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.surroundings import RESULTS, ROOT, surroundings

CONTENDERS = ("bitsandbytes", "ours")
# What of ours is compared with what of theirs.
RIVALS = {
    "quantize": ("quantize",),
    "dequantize": ("dequantize",),
    "dequantize into out": ("dequantize", "kernel", "kernel without AVX512"),
}


@dataclass(frozen=True)
class Setting:
    """What is measured: a weight and how many threads."""

    rows: int
    columns: int
    dtype: str
    threads: int


def main() -> int:
    """Measure, print, keep; 1 when the contenders computed different things."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="one setting, two rounds, nothing kept"
    )
    parser.add_argument("--shape", type=_shape, action="append", metavar="ROWSxCOLUMNS")
    parser.add_argument("--rounds", type=int, help="processes of each contender and setting")
    arguments = parser.parse_args()
    quick = arguments.quick
    shapes = arguments.shape or [(4096, 4096)] + ([] if quick else [(14336, 4096)])
    rounds = arguments.rounds or (2 if quick else 3)
    settings = [
        Setting(rows, columns, dtype, threads)
        for rows, columns in shapes
        for dtype in (("bfloat16",) if quick else ("bfloat16", "float32"))
        for threads in ((2,) if quick else (2, 1))
    ]

    about = _about()
    print(f"{about['cpu']}, {about['cpus']} CPUs, load {about['load']}; {about['versions']}\n")
    table: list[dict[str, Any]] = []
    wrong: list[str] = []
    for setting in settings:
        print(f"{setting.rows} x {setting.columns}, {setting.dtype}, {setting.threads} threads")
        rows, different = measure(setting, rounds)
        for row in rows:
            print(_line(row))
        table += rows
        wrong += [f"{setting}: {what} differs" for what in different]
    if not quick:
        RESULTS.mkdir(parents=True, exist_ok=True)
        file = RESULTS / f"quantize-cpu-{about['commit']}.json"
        file.write_text(json.dumps(about | {"rows": table}, indent=1) + "\n")
        print(f"\nKept in {file.relative_to(ROOT)}")
    print("\n".join(wrong) or "\nBoth gave the same codes and the same values, bit for bit.")
    return 1 if wrong else 0


def measure(setting: Setting, rounds: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Run the processes of one setting; return the table's rows, and what came out differently."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for contender in _turns(rounds):
        for what, one in _run(contender, setting).items():
            found["both" if what == "copy" else contender, what].append(one)
    medians = {key: [statistics.median(one["ms"]) for one in runs] for key, runs in found.items()}
    rates = {
        key: found[key][0]["bytes"] / statistics.median(ms) / 1e6 for key, ms in medians.items()
    }
    rows: list[dict[str, Any]] = []
    for (contender, what), ms in medians.items():
        runs = found[contender, what]
        row: dict[str, Any] = vars(setting) | {
            "contender": contender,
            "what": what,
            "ms": statistics.median(ms),
            "process_ms": ms,
            "gb_per_s": rates[contender, what],
            "share_of_copy": rates[contender, what] / rates["both", "copy"],
            "peak_mib": _mib([one["peak_bytes"] for one in runs]),
        }
        if contender == "ours":
            row["times_as_fast_as"] = {
                rival: statistics.median(medians["bitsandbytes", rival]) / row["ms"]
                for rival in RIVALS[what]
            }
        rows.append(row)
    return rows, _different(found)


def _turns(rounds: int) -> Iterator[str]:
    """A B B A A B ...: what drifts with time hits both alike."""
    for turn in range(rounds):
        yield from CONTENDERS if turn % 2 == 0 else reversed(CONTENDERS)


def _run(contender: str, setting: Setting) -> dict[str, dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    arguments = [contender, *map(str, vars(setting).values())]
    done = subprocess.run(
        [sys.executable, "-m", "bench.quantize_process", *arguments],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": str(setting.threads)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if done.returncode:
        raise SystemExit(f"measuring {contender} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])["found"]


def _different(found: dict[tuple[str, str], list[dict[str, Any]]]) -> list[str]:
    """Name what did not come out the same in every process of both contenders."""
    digests: dict[str, set[str]] = defaultdict(set)
    for (_, what), runs in found.items():
        if what != "copy":
            kind = "quantize" if what == "quantize" else "dequantize"
            digests[kind] |= {one["digest"] for one in runs}
    return [kind for kind, different in digests.items() if len(different) > 1]


def _mib(peaks: list[int | None]) -> float | None:
    known = [peak for peak in peaks if peak is not None]
    return max(known) / 2**20 if known else None


def _line(row: dict[str, Any]) -> str:
    ms, peak = row["process_ms"], row["peak_mib"]
    faster = row.get("times_as_fast_as", {})
    return (
        f"  {row['contender']:12}  {row['what']:21}  {row['ms']:8.2f} ms [{min(ms):.2f} to {max(ms):.2f}]"
        f"  {row['gb_per_s']:6.1f} GB/s  {row['share_of_copy']:5.0%} of a copy"
        f"  {'' if peak is None else f'{peak:5.0f} MiB'}  "
        + ", ".join(f"{ratio:.2f} x {rival}" for rival, ratio in faster.items())
    )


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


def _about() -> dict[str, Any]:
    import torch

    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return surroundings("torch", "bitsandbytes", "llvmlite") | {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "transparent_hugepages": pages.read_text().strip() if pages.exists() else None,
    }


if __name__ == "__main__":
    sys.exit(main())
