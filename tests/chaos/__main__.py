"""`python -m tests.chaos`: jobs under fire, a table of what that cost, and a nonzero status where anything was lost or doubled."""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.surroundings import RESULTS, surroundings
from operations.stopping import stop_on_signals
from tests.chaos.faults import FAULTS, SHORT
from tests.chaos.storm import Outcome, run
from tests.tiny_models import save_tiny_llama

JOBS = 30
_HEADS = ("fault", "injected", "jobs", "lost", "doubled", "median s", "worst s")


def main() -> int:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="which moments and victims; drawn otherwise")
    parser.add_argument("--jobs", type=int, default=JOBS)
    parser.add_argument("--fault", action="append", choices=FAULTS, help="may be repeated")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the result")
    parser.add_argument("--keep", type=Path, help="a new folder for data and logs, which stays")
    arguments = parser.parse_args()
    stop_on_signals()
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    about = surroundings("openai", "celery", "torch")
    began = time.monotonic()

    def say(message: str) -> None:
        sys.stderr.write(f"{time.monotonic() - began:6.1f}  {message}\n")

    say(f"seed {seed}")
    with tempfile.TemporaryDirectory() as scratch:
        folder: Path = arguments.keep or Path(scratch) / "service"
        folder.mkdir(parents=True)
        model = save_tiny_llama(Path(scratch) / "tiny")
        faults: list[str] = arguments.fault or SHORT
        outcome = run(folder, model, seed=seed, jobs=arguments.jobs, faults=faults, say=say)
    file = arguments.results / f"chaos-cpu-{about['commit']}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(about | asdict(outcome), indent=1) + "\n")
    told = [table(outcome), f"Kept in {file}", *outcome.findings.all()]
    sys.stdout.write("\n".join(told) + "\n")
    return 1 if outcome.findings.all() else 0


def table(outcome: Outcome) -> str:
    """One line per fault; lost and doubled are the whole run's, since faults of one run meet in the same jobs."""
    lines = [
        _HEADS,
        *(_row(name, outcome) for name in dict.fromkeys(s.fault for s in outcome.strikes)),
    ]
    total = (
        "the run",
        len(outcome.strikes),
        outcome.submissions,
        len(outcome.findings.lost),
        len(outcome.findings.doubled),
        "",
        f"{outcome.seconds:.1f}",
    )
    return "\n".join(_line(line) for line in [*lines, total])


def _row(name: str, outcome: Outcome) -> tuple[Any, ...]:
    strikes = [strike for strike in outcome.strikes if strike.fault == name]
    seconds = [strike.seconds for strike in strikes]
    hit = sum(strike.jobs_hit for strike in strikes)
    median = f"{statistics.median(seconds):.1f}"
    return (name, len(strikes), hit, "", "", median, f"{max(seconds):.1f}")


def _line(cells: tuple[Any, ...]) -> str:
    first, *others = cells
    return f"{first:<32}" + "".join(f"{cell!s:>10}" for cell in others)


if __name__ == "__main__":
    sys.exit(main())
