"""What writing a resume point costs, beside writing as many bytes into one file.

`.venv/bin/python -m bench.resume_points` writes points of an adapter with moments in 32 bits, of two sizes, into a temporary
folder, prints a table and keeps it in `bench/results/`. The floor is one file of as many bytes, written from memory at
once, and `fsync`. The two take turns within one process; before each the disk has nothing left to write. What a point's
step waits for is measured: its files, their sums, `fsync` of each, and the renaming of an old one, whose room is freed
beside the steps that follow. The ratio is the median of the turns' ratios, as they follow each other.
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
from torch import nn

from bench.surroundings import RESULTS, surroundings
from qlora_core.optim.flat_adamw import FlatAdamW
from qlora_core.train.progress import Progress
from qlora_core.train.resume.files import discard_old_points
from qlora_core.train.resume.points import save_resume_point

# Adapter and moments in float32 of rank 16 over square layers: tensors of 16 x width.
SIZES = {"50 MB": (128, 2048), "340 MB": (432, 4096)}
ALLOWED = 1.05


def main() -> int:
    """Measure, print, keep; 1 where a point costs more than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="of both, for each size")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder otherwise")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the result")
    arguments = parser.parse_args()

    about = surroundings("torch")
    print(f"{about['cpu']}, {about['cpus']} CPUs, load {about['load']:.1f}; {about['versions']}")
    rows = [
        measure(name, *size, arguments.rounds, arguments.folder) for name, size in SIZES.items()
    ]
    file = arguments.results / f"resume-points-cpu-{about['commit']}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    print(f"Kept in {file}")
    return 0 if all(row["ratio"] <= ALLOWED for row in rows) else 1


def measure(
    name: str, tensors: int, width: int, rounds: int, parent: Path | None
) -> dict[str, Any]:
    """Write points and plain files in turns; print and give what came of it."""
    torch.manual_seed(0)
    model = nn.ParameterList([nn.Parameter(torch.randn(16, width)) for _ in range(tensors)])
    optimizer = FlatAdamW(list(model), bits=32, learning_rate=1e-3)
    optimizer.step()
    points: list[float] = []
    floors: list[float] = []
    with tempfile.TemporaryDirectory(dir=parent) as scratch:
        folder = Path(scratch)
        nbytes = 0
        for step in range(rounds + 2):  # the first two have nothing to discard, and warm up
            point, seconds = write_point(folder / "resume", step, model, optimizer)
            nbytes = sum(path.stat().st_size for path in point.iterdir())
            floor = write_plainly(folder / "plain", nbytes)
            if step >= 2:
                points.append(seconds)
                floors.append(floor)
    ratios = [point / floor for point, floor in zip(points, floors, strict=True)]
    row: dict[str, Any] = {
        "name": name,
        "bytes": nbytes,
        "tensors": tensors,
        "point_s": statistics.median(points),
        "floor_s": statistics.median(floors),
        "ratio": statistics.median(ratios),
        "ratios": sorted(ratios),
    }
    print(
        f"  {name:>6} ({nbytes:,} bytes): a point {row['point_s'] * 1e3:6.1f} ms, one file {row['floor_s'] * 1e3:6.1f} ms, "
        f"ratio {row['ratio']:.3f} (of {rounds} turns from {min(ratios):.2f} to {max(ratios):.2f})"
    )
    return row


def write_point(
    folder: Path, step: int, model: nn.Module, optimizer: FlatAdamW
) -> tuple[Path, float]:
    """Write a point as a run does; give its folder and the seconds that the run waits."""
    os.sync()
    began = time.perf_counter()
    point = save_resume_point(
        folder, model=model, optimizer=optimizer, progress=Progress(step=step), best={}, identity={}
    )
    freeing = discard_old_points(folder, step)
    seconds = time.perf_counter() - began
    freeing.result()
    return point, seconds


def write_plainly(path: Path, nbytes: int) -> float:
    """Write so many bytes into one file and wait for the disk; give the seconds."""
    data = os.urandom(nbytes)
    os.sync()
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        file.write(data)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


if __name__ == "__main__":
    sys.exit(main())
