"""Everything that wants a GPU, in one command of at most ten minutes: `make gpu-bench`.

What is done is kept group by group and not run again (`--again` runs it all), so a run that was cut off goes on where
it was. Needs only what `qlora_core` needs; bitsandbytes is measured beside it where it can be used. `--device cpu` tries
the same code on small sizes, through Triton's interpreter; what it prints then measures nothing, and nothing is kept.
"""

import argparse
import os
import sys
import time
import traceback
import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.gpu.groups import Group
    from bench.gpu.results import Results

RESULTS = Path(__file__).resolve().parent / "results"
# In the order in which they are run: each part's groups come from its module in bench.gpu.
PARTS = {
    "checks": "checks",
    "dequantize": "speed",
    "quantize": "speed",
    "optimizer": "optimizer",
    "paging": "paging",
    "finetune": "finetune",
}


def main() -> int:
    """Run what has no result yet, print it, keep it; 1 if something is wrong."""
    arguments = _arguments()
    deadline = time.monotonic() + 60 * arguments.minutes
    if arguments.device == "cpu":
        _interpret()
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("There is no NVIDIA GPU that torch can use on this machine: nothing to measure.")
        return 0

    from bench.gpu.results import Results

    folder = arguments.results if arguments.device == "cuda" else None
    results = Results(folder, arguments.device, commit=arguments.commit, again=arguments.again)
    for key, value in results.about.items():
        print(f"{key}: {value}")
    groups = [group for part in arguments.parts for group in _groups(part, arguments.device)]
    left, failed = _run(groups, results, deadline)
    wrong = results.wrong()
    print(f"\nKept in {results.file}" if results.file else "\nOn a CPU nothing is kept.")
    if left:
        print(f"The time is up before: {', '.join(left)}. The same command goes on from there.")
    if failed:
        print(f"FAILED, see above: {', '.join(failed)}.")
    print(f"WRONG: {', '.join(wrong)}." if wrong else "Nothing is wrong in what has a result.")
    return 1 if wrong or failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--again", action="store_true", help="run groups that have a result, too")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=8, help="begin no group after so many")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder for results")
    parser.add_argument("--commit", help="of this code, where git cannot tell")
    return parser.parse_args()


def _interpret() -> None:
    """Let Triton interpret; it reads the variable when it is imported, which nothing has done yet."""
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.qlora_core.triton_interpreter import mend

    mend()
    # A GPU divides by zero without a word; numpy, behind the interpreter, warns.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")


def _groups(part: str, device: str) -> "list[Group]":
    module = import_module(f"bench.gpu.{PARTS[part]}")
    return [group for group in module.groups(device) if group.part == part]


def _run(groups: "list[Group]", results: "Results", deadline: float) -> tuple[list[str], list[str]]:
    """Run groups until the deadline; give the names of those not begun, and of those that failed."""
    left: list[str] = []
    failed: list[str] = []
    for group in groups:
        began = time.monotonic()
        if group.name not in results.groups:
            if began > deadline:
                left.append(group.name)
                continue
            try:
                rows = group.run()
            except Exception:  # noqa: BLE001 - time on a GPU is short; one broken group costs no other
                traceback.print_exc()
                failed.append(group.name)
                continue
            results.keep(group.name, rows)
        print(f"\n{group.name} ({time.monotonic() - began:.0f} s)", flush=True)
        for row in results.groups[group.name]:
            print("  " + "  ".join(f"{key}={_short(value)}" for key, value in row.items()))
    return left, failed


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
