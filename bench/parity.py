"""How far a run of ours is from one of bitsandbytes and peft: twenty steps from one checkpoint of tiny-llama in NF4.

`.venv/bin/python -m bench.parity` prints, for several learning rates, the largest relative difference of a step's loss: of
ours from theirs in float32 and in bfloat16, and of each in bfloat16 from itself in float32, which is what rounding alone makes
of a run. It keeps them with the curves in `bench/results/`. The runs are those of the test
(`tests/qlora_core/train/test_against_bitsandbytes.py`), so the two cannot drift apart.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.surroundings import RESULTS, ROOT, surroundings
from tests.qlora_core.train.beside_bitsandbytes import two_curves, worst

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-4, 1e-3, 3e-3, 1e-2])
    parser.add_argument("--keep", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    rows = [_row(rate) for rate in arguments.rates]
    print("rate    loss           ours/theirs float32  bfloat16  bfloat16/float32 theirs  ours")
    for row in rows:
        first, last = row["float32"]["theirs"][0], row["float32"]["theirs"][-1]
        print(
            f"{row['rate']:<7g} {first:.2f} to {last:.2f}   {row['float32']['worst']:<20.1e} {row['bfloat16']['worst']:<9.1e} "
            f"{row['rounding']['theirs']:<24.1e} {row['rounding']['ours']:.1e}"
        )
    if arguments.keep:
        _keep(rows)
    return 0


def _row(rate: float) -> dict[str, Any]:
    row: dict[str, Any] = {"rate": rate}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with tempfile.TemporaryDirectory() as folder:
            theirs, ours = two_curves(
                ROOT / "examples" / "tiny-llama", Path(folder), dtype=dtype, rate=rate
            )
        row[name] = {"theirs": theirs, "ours": ours, "worst": worst(ours, theirs)}
    row["rounding"] = {
        whose: worst(row["bfloat16"][whose], row["float32"][whose]) for whose in ("theirs", "ours")
    }
    return row


def _keep(rows: list[dict[str, Any]]) -> None:
    about = surroundings(*_PACKAGES)
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"parity-cpu-{about['commit']}.json"
    file.write_text(json.dumps(about | {"model": "tiny-llama", "rows": rows}) + "\n")
    print(f"Kept in {file.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
