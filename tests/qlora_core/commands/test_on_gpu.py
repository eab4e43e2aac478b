"""The commands where there is a GPU: auto means it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from qlora_core.commands import app
from tests.qlora_core.commands.conftest import WriteRun

pytestmark = pytest.mark.gpu


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])

    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_run_trains_on_the_gpu_and_its_adapter_answers_there(
    tmp_path: Path, base: Path, write_run: WriteRun
) -> None:
    file = write_run(train="max_steps = 2")
    file.write_text(file.read_text().replace('device = "cpu"', 'device = "auto"'))

    run("train", file)
    answer = run("generate", base, "Hm?", "--adapter", tmp_path / "out" / "adapter")

    events = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").open()]
    (started,) = (event for event in events if event["kind"] == "run_started")
    assert started["device"] == torch.cuda.get_device_name()
    assert answer.endswith("\n")


def test_an_estimate_is_held_against_what_the_gpu_has_free(base: Path) -> None:
    found = json.loads(run("estimate", base, "--json"))

    assert found["device"] == "cuda"
    assert 0 < found["room_bytes"] <= torch.cuda.mem_get_info()[1]
    assert found["fits"] is True
