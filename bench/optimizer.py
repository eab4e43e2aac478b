"""AdamW on the CPU beside torch's and bitsandbytes': bytes of state per trained parameter, and how long a step takes.

`.venv/bin/python -m bench.optimizer` prints a table and keeps it in `bench/results/`. It measures the tensors of two adapters,
a large one and a small one. Every measurement is a process of its own, the contenders take turns, forth and back, and a figure is the
median of the processes' medians. A process that the file has is not run again: with `--minutes` it stops, and the same
command goes on.

The floor: a step with moments in 32 bits reads weight, gradient and two moments of an element and writes all but the
gradient, 28 bytes; with moments in 8 bits 16 bytes, and a sixteenth of one for the scales of their blocks. To clip takes 4
more, because the norm is of the whole gradient. The rate at which these bytes go through is told as a share of that of a copy of as many
elements. It may be more than all of it: half of what a copy moves is written, of a step's bytes less.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.kept_file import OtherSettings, keep, open_kept
from bench.optimizer_process import ADAPTERS, CONTENDERS
from bench.surroundings import RESULTS, ROOT, surroundings

# By element, of 32 and of 8 bits; a copy moves 8.
FLOOR_BYTES = {32: 28.0, 8: 16.0 + 4 * 4 / 256}
CLIP_BYTES = 4.0
COPY_BYTES = 8.0
# Whom a contender is compared with.
RIVALS = {32: "torch AdamW, fused", 8: "bitsandbytes AdamW8bit"}
# Moments in 8 bits go another way by this share at most.
SAME_WAY = 0.01


def main() -> int:
    """Measure what is missing, print, keep; 1 when the contenders did not do the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=ADAPTERS, default=list(ADAPTERS)[:2])
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument(
        "--rounds", type=int, default=3, help="processes of each contender and setting"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin none after so many")
    parser.add_argument(
        "--file", type=Path, help="of the results; one for this commit if not given"
    )
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    about = surroundings("torch", "bitsandbytes")
    file = arguments.file or RESULTS / f"optimizer-cpu-{about['commit']}.json"
    try:
        kept = open_kept(file, about, {"versions": about["versions"], "cpu": about["cpu"]})
    except OtherSettings as error:
        print(error, file=sys.stderr)
        return 2

    done = {_key(run) for run in kept["runs"]}
    for size, threads, turn, contender in plan(
        arguments.sizes, arguments.threads, arguments.rounds
    ):
        setting: dict[str, Any] = {
            "size": size, "threads": threads, "turn": turn, "contender": contender,
        }  # fmt: skip
        if _key(setting) in done:
            continue
        if time.monotonic() > deadline:
            print("The time is up. The same command goes on from here.")
            break
        kept["runs"].append(setting | _run(contender, size, threads))
        keep(kept, file)
    rows = summary(kept["runs"])
    print(f"{about['cpu']}, {about['cpus']} CPUs; {about['versions']}")
    print("\n".join(table(rows)))
    print(f"Kept in {file}")
    wrong = astray(rows)
    print("\n".join(wrong) or "All contenders moved the weights by the same distance.")
    return 1 if wrong else 0


def plan(
    sizes: Sequence[str], threads: Sequence[int], rounds: int
) -> Iterator[tuple[str, int, int, str]]:
    """Give size, threads, turn and contender: forth and back, so that what drifts with time hits all alike."""
    for size in sizes:
        for count in threads:
            for turn in range(rounds):
                for contender in list(CONTENDERS)[:: 1 if turn % 2 == 0 else -1]:
                    yield size, count, turn, contender


def _key(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run[name] for name in ("size", "threads", "turn", "contender"))


def _run(contender: str, size: str, threads: int) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.optimizer_process", contender, size, str(threads)],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if done.returncode:
        raise SystemExit(f"measuring {contender} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give a row per size, number of threads and contender."""
    found: dict[tuple[str, int, str], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        found[run["size"], run["threads"], run["contender"]].append(run)
    rows: list[dict[str, Any]] = []
    for (size, threads, contender), processes in found.items():
        beside = [
            one["copy_ms"] for key, many in found.items() if key[:2] == (size, threads) for one in many
        ]  # fmt: skip
        bits = 8 if "8bit" in contender else 32
        copy_ms = statistics.median(beside) * (FLOOR_BYTES[bits] + CLIP_BYTES) / COPY_BYTES
        ms = [one["clip_and_step_ms"] for one in processes]
        row: dict[str, Any] = {
            "size": size, "threads": threads, "contender": contender, "bits": bits,
            "elements": processes[0]["elements"], "moved": processes[0]["moved"],
            "bytes_per_element": processes[0]["state_bytes"] / processes[0]["elements"],
            "step_ms": statistics.median(one["step_ms"] for one in processes),
            "clip_and_step_ms": statistics.median(ms), "low_ms": min(ms), "high_ms": max(ms),
            "share_of_copy": copy_ms / statistics.median(ms),
        }  # fmt: skip
        rows.append(row)
    return sorted(rows, key=lambda row: (-row["elements"], -row["threads"]))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Say what each contender takes, and by how many times a rival's time it is as fast."""
    lines: list[str] = []
    setting = None
    for row in rows:
        if setting != (setting := (row["size"], row["threads"])):
            lines.append(f"\n{row['size']}: {row['elements']:,} elements, {row['threads']} threads")
        rival = _row_of(rows, row, RIVALS[row["bits"]])
        faster = ""
        if rival is not None and row["contender"].startswith("ours"):
            ratio = rival["clip_and_step_ms"] / row["clip_and_step_ms"]
            faster = f"  {ratio:.2f} x {rival['contender']}"
        lines.append(
            f"  {row['contender']:27}  {row['bytes_per_element']:5.3f} bytes per element  step {row['step_ms']:8.2f} ms, "
            f"clipped {row['clip_and_step_ms']:8.2f} ms [{row['low_ms']:.2f} to {row['high_ms']:.2f}], "
            f"{row['share_of_copy']:4.0%} of a copy's rate{faster}"
        )
    return lines


def astray(rows: list[dict[str, Any]]) -> list[str]:
    """Name the contenders that moved the weights by another distance than torch's."""
    found: list[str] = []
    for row in rows:
        torch_row = _row_of(rows, row, RIVALS[32])
        if torch_row is not None and abs(row["moved"] / torch_row["moved"] - 1) > SAME_WAY:
            found.append(
                f"{row['contender']} moved {row['size']} by {row['moved']:.4f}, torch by {torch_row['moved']:.4f}"
            )
    return found


def _row_of(
    rows: list[dict[str, Any]], beside: dict[str, Any], contender: str
) -> dict[str, Any] | None:
    setting = (beside["size"], beside["threads"], contender)
    return next(
        (row for row in rows if (row["size"], row["threads"], row["contender"]) == setting), None
    )


if __name__ == "__main__":
    sys.exit(main())
