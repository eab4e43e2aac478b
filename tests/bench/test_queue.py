"""The bench of the queue, tried on a tiny one."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_tiny_crowd_claims_everything_once_and_says_how_fast() -> None:
    command = [sys.executable, "-m", "bench.queue", "--no-keep"]

    done = subprocess.run(
        [*command, "--workers", "2", "--jobs", "10", "--finish", "12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["claimed"], told["claimed_twice"], told["not_finished"]) == (12, 0, 0)
    assert told["claim_ms"]["median"] > 0
    assert told["share_of_bare"] > 0
