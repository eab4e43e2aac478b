"""Kills writers of resume points, again and again, and looks after each what a run would go on from.

``python -m tests.qlora_core.train.resume.killed_writers FOLDER SEED COUNT`` prints a line of JSON for each: the last step whose
writing the writer saw end, the step that a run takes, what was refused, and whether something was left half-written.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from tests.qlora_core.train.resume.tiny_points import TinyRun, taken

_STEP_BYTES = 4


def main() -> None:
    """Kill as often as the arguments say."""
    folder, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)  # a process with more cannot be forked
    drawn = random.Random(seed)
    newest = 0
    for _ in range(count):
        ended = kill_a_writer(folder, newest + 1, after_s=drawn.uniform(0.0, 0.08)) or newest
        half_written = any(folder.glob(".*.unfinished"))
        step, refused = taken(folder)
        sys.stdout.write(json.dumps({"ended": ended, "taken": step, "refused": refused, "half_written": half_written}) + "\n")  # fmt: skip
        newest = step or 0


def kill_a_writer(folder: Path, first: int, *, after_s: float) -> int | None:
    """Let a process write points from a step on until it is killed; give the last whose writing ended."""
    receiving, sending = os.pipe()
    writer = os.fork()
    if writer == 0:
        write_for_ever(folder, first, sending)
    os.close(sending)
    time.sleep(after_s)
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    with os.fdopen(receiving, "rb") as pipe:
        told = pipe.read()
    return int.from_bytes(told[-_STEP_BYTES:], "little") if told else None


def write_for_ever(folder: Path, step: int, sending: int) -> None:
    """Write point after point, and tell of each when it is on the disk."""
    run = TinyRun()
    while True:
        run.write(folder, step)
        os.write(sending, step.to_bytes(_STEP_BYTES, "little"))
        step += 1


if __name__ == "__main__":
    main()
