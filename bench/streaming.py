"""What reading a large training file takes, in memory, time and disk: tokenizing it, then a stretch of a shuffled epoch.

`.venv/bin/python -m bench.streaming --gigabytes 10` writes a file of chats in a temporary folder, prints what reading it
took and keeps it in `bench/results/`. The reader is a process of its own; memory is what `/proc` says, twenty times a
second, of that process (VmHWM is its own peak) and of it together with the processes that tokenize for it. The promise
that it is held to: no more than 1 GB in the reader, whatever the file's size.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.surroundings import RESULTS, ROOT, surroundings

ALLOWED_BYTES = 1_000_000_000
_BLOCK_BYTES = 32_000_000
_LOOK_S = 0.05


def main() -> int:
    """Measure, print, keep; 1 where the promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=0.1, help="of the training file")
    parser.add_argument(
        "--processes", type=int, help="that tokenize; as many as usual if not given"
    )
    parser.add_argument("--epoch-seconds", type=float, default=20, help="of a shuffled epoch")
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny-llama")
    parser.add_argument("--folder", type=Path, help="for the file and its tokens")
    parser.add_argument("--keep", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()

    about = surroundings("tokenizers", "torch")
    print(f"{about['cpu']}, {about['cpus']} CPUs, load {about['load']:.1f}; {about['versions']}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        path = Path(scratch) / "train.jsonl"
        write_chats(path, int(arguments.gigabytes * 1e9))
        row = measure(path, arguments.model, arguments.processes, arguments.epoch_seconds)
    print(
        "{gb:.2f} GB, {examples:,} examples, {tokens:,} tokens: read in {seconds:.0f} s by {processes} process(es), "
        "{tokens_per_s:,.0f} tokens/s, {mb_per_s:.1f} MB/s, {cpu_seconds:.0f} s of CPU; then {drawn:,} tokens of a "
        "shuffled epoch at {drawn_per_s:,.0f} tokens/s.\n"
        "Peak memory: {reader_mb:.0f} MB in the reader, {together_mb:.0f} MB with the processes that tokenize for it; "
        "{disk_mb:.0f} MB of tokens on disk, by calculation.".format(**row)
    )
    if arguments.keep:
        RESULTS.mkdir(parents=True, exist_ok=True)
        file = RESULTS / f"streaming-{arguments.gigabytes:g}gb-{about['commit']}.json"
        file.write_text(json.dumps(about | row, indent=1) + "\n")
        print(f"Kept in {file.relative_to(ROOT)}")
    return 0 if row["reader_mb"] * 1e6 <= ALLOWED_BYTES else 1


def write_chats(path: Path, size: int) -> None:
    """Write a file of chats of many lengths; from some megabytes on they repeat."""
    draw, words = random.Random(0), (ROOT / "README.md").read_text().split()  # noqa: S311 - chats, no secret

    def lines() -> Iterator[bytes]:
        while True:
            messages = [
                {"role": role, "content": " ".join(draw.choices(words, k=int(draw.lognormvariate(mean, 0.9)) + 1))}
                for _ in range(draw.choice((1, 1, 1, 2, 4)))
                for role, mean in (("user", 3), ("assistant", 4))
            ]  # fmt: skip
            yield json.dumps({"messages": messages}).encode() + b"\n"

    block, held = [], 0
    for line in lines():
        block.append(line)
        held += len(line)
        if held >= min(size, _BLOCK_BYTES):
            break
    with path.open("wb") as file:
        while file.tell() < size:
            file.write(b"".join(block))


def measure(path: Path, model: Path, processes: int | None, epoch_seconds: float) -> dict[str, Any]:
    """Read the file in a new process, and watch its memory from here."""
    task = {
        "path": str(path),
        "model": str(model),
        "processes": processes,
        "epoch_seconds": epoch_seconds,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.streaming_process", json.dumps(task)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None  # noqa: S101 - a pipe, as asked for
    reader = together = 0
    with process:
        while process.poll() is None:
            now = [_resident(pid) for pid in _family(process.pid)]
            reader = max(reader, _resident(process.pid, "VmHWM"))
            together = max(together, sum(now))
            time.sleep(_LOOK_S)
        told = json.loads(process.stdout.read())
    return told | {
        "gb": path.stat().st_size / 1e9,
        "mb_per_s": path.stat().st_size / 1e6 / told["seconds"],
        "tokens_per_s": told["tokens"] / told["seconds"],
        "drawn_per_s": told["drawn"] / told["drawn_seconds"],
        "reader_mb": reader / 1e6,
        "together_mb": max(together, reader) / 1e6,
    }


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [pid, *map(int, children)]


def _resident(pid: int, field: str = "VmRSS") -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


if __name__ == "__main__":
    sys.exit(main())
