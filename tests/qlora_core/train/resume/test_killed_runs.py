"""A run that is killed anywhere and resumed, again and again, ends as the unbroken one does, bit for bit."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.qlora_core.train.conftest import ANSWERS

# Of a step the time it took and the memory are its own.
_MEASURED = ("tokens_per_s", "step_time_s", "memory", "mfu")
_OF_THE_RESULT = ("step_metrics", "validation_metrics", "checkpoint_saved", "run_finished")


def case(seed: int, *, ends_in_step: int | None = None, **config: Any) -> dict[str, Any]:
    return {"seed": seed, "ends_in_step": ends_in_step, "config": {"dropout": 0.2, **config}}


CASES = [
    case(1, optimizer="adamw", resume_point_every_s=0.0),
    case(2, optimizer="adamw_8bit", packing=False, micro_batch_tokens=48, dropout=0.0),
    case(3, optimizer="paged_adamw_8bit", micro_batch_tokens=48, resume_point_every_s=0.0,
         eval_steps=1, early_stopping_patience=4),
    case(4, optimizer="paged_adamw", packing=False, ends_in_step=3, resume_point_every_s=0.0),
]  # fmt: skip
MANY = [
    case(seed, optimizer=optimizer, packing=packing, micro_batch_tokens=tokens, dropout=dropout,
         ends_in_step=ends_in_step, resume_point_every_s=every_s)
    for seed, (optimizer, packing, tokens, dropout, ends_in_step, every_s) in enumerate(
        itertools.product(
            ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"), (True, False), (48, 4096),
            (0.0, 0.2), (None, 4), (0.0, 1e9),
        )
    )
]  # fmt: skip


@pytest.mark.parametrize(
    "cases", [CASES, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])], ids=len
)  # fmt: skip
def test_whatever_is_killed_the_adapter_and_the_figures_are_those_of_the_unbroken_run(
    cases: list[dict[str, Any]], base: Path, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "base")
    _write_chats(tmp_path / "train.jsonl", 12)
    _write_chats(tmp_path / "valid.jsonl", 5)
    (tmp_path / "cases.json").write_text(json.dumps(cases))

    done = subprocess.run(
        [sys.executable, "-m", "tests.qlora_core.train.resume.killed_runs", tmp_path],
        capture_output=True, text=True, timeout=1700, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    kills = [json.loads((tmp_path / f"{n}/kills.json").read_text()) for n in range(len(cases))]
    assert sum(map(len, kills)) > 2 * len(cases)
    assert any(".unfinished" in kill for kill in itertools.chain(*kills))
    for number in range(len(cases)):
        _assert_equal(tmp_path / str(number))


def _write_chats(path: Path, count: int) -> None:
    lines = [
        {"messages": [{"role": "user", "content": f"Question {i * 7 % 31}?"},
                      {"role": "assistant", "content": ANSWERS[i % len(ANSWERS)]}]}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _assert_equal(place: Path) -> None:
    """Hold the files of both runs to be the same, and everything that the broken one told, also twice, to the unbroken one's."""
    for part in (
        "adapter",
        *(f"checkpoints/{path.name}" for path in (place / "whole/checkpoints").iterdir()),
    ):
        for path in (place / "whole" / part).iterdir():
            assert (place / "broken" / part / path.name).read_bytes() == path.read_bytes(), path
    whole, broken = (_told(place / f"{name}.jsonl") for name in ("whole", "broken"))
    expected = {(event["kind"], event.get("step")): event for event in whole}
    assert {(event["kind"], event.get("step")) for event in broken} == set(expected)
    for event in broken:
        assert event == expected[event["kind"], event.get("step")]


def _told(path: Path) -> list[dict[str, Any]]:
    """Read what is told of the result, without what differs by nature."""
    events = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {name: value for name, value in event.items() if name not in (*_MEASURED, "folder")}
        for event in events
        if event["kind"] in _OF_THE_RESULT
    ]
