"""`python -m qlora_core estimate`: the engine's estimate of a model or a run's file, as a table and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from qlora_core import LoraConfig, TextEncoder, TrainConfig, load_dataset
from qlora_core import estimate as estimate_run
from qlora_core.commands import app
from qlora_core.estimate import largest_fitting
from qlora_core.units import size
from tests.qlora_core.commands.conftest import WriteRun


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["estimate", *map(str, arguments)])


def document(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")

    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)


def refusal(*arguments: object) -> str:
    result = run(*arguments)

    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_a_model_alone_is_estimated_with_the_usual_settings_in_its_own_context(base: Path) -> None:
    found = document(base, "--device", "cuda", "--memory", "1GiB")

    expected = estimate_run(base, {"context_length": 128}).as_dict()
    assert {name: found[name] for name in ("memory", "parameters", "tokens_per_step")} == {
        name: expected[name] for name in ("memory", "parameters", "tokens_per_step")
    }
    assert (found["fits"], found["room_bytes"], found["steps"]) == (True, 2**30, None)


def test_of_a_runs_file_the_settings_and_the_lengths_of_the_examples_count(
    tmp_path: Path, base: Path, write_run: WriteRun
) -> None:
    file = write_run(train="n_epochs = 2\ncontext_length = 64", model="block_size = 128")

    found = document(file)

    dataset = load_dataset(
        tmp_path / "train.jsonl", TextEncoder.from_folder(base), context_length=64
    )
    tokens = sum(dataset.lengths)
    settings = TrainConfig(
        batch_size=4,
        n_epochs=2,
        context_length=64,
        gradient_checkpointing=False,
        lora=LoraConfig(r=4, alpha=8),
    )
    expected = estimate_run(
        base,
        settings,
        device="cpu",
        longest_tokens=max(dataset.lengths),
        mean_tokens=tokens / len(dataset),
        trained_share=sum(dataset.trained_counts) / tokens,
        block_size=128,
    ).as_dict()
    assert found["memory"] == expected["memory"]
    assert found["tokens_per_step"] == expected["tokens_per_step"]
    assert (found["device"], found["steps"]) == ("cpu", 6)


def test_without_its_data_a_run_is_estimated_at_its_longest(
    tmp_path: Path, write_run: WriteRun
) -> None:
    file = write_run(train="context_length = 64")
    (tmp_path / "train.jsonl").unlink()

    found = document(file)

    assert found["tokens_per_step"] == 4 * 64
    assert found["steps"] is None
    assert any("train.jsonl is not there" in sentence for sentence in found["assumed"])


def test_the_table_says_each_kind_and_whether_it_fits(base: Path) -> None:
    fits = run(base, "--memory", "24GiB").stdout
    not_at_all = run(base, "--memory", "1 MB").stdout

    found = estimate_run(base, {"context_length": 128})
    for row in ("base weights", "adapter", "optimizer", "activations", "memory at the peak"):
        assert row in fits
    assert "fits into 24.0 GiB" in fits
    assert "yes" in fits
    assert "fits into 1.0 MiB" in not_at_all
    assert "are missing" in not_at_all
    rows = [" ".join(line.split()) for line in fits.splitlines()]
    assert f"│ each resume point on disk │ {size(found.resume_point_bytes)} │" in rows
    assert f"│ the adapter on disk │ {size(found.adapter_file_bytes)} │" in rows
    assert "Assumed: step time is calculated, not measured" in fits


def test_of_what_does_not_fit_it_is_said_what_would(base: Path) -> None:
    settings = {"context_length": 128}
    room = estimate_run(base, settings, device="cpu").memory.total_bytes - 1
    expected = largest_fitting(base, settings, room_bytes=room, device="cpu")

    found = document(base, "--device", "cpu", "--memory", str(room))
    said = run(base, "--device", "cpu", "--memory", str(room)).stdout

    assert found["would_fit"] == expected.as_dict()
    assert found["would_fit"]["settings"] == {"optimizer": "adamw_8bit"}
    assert said.endswith(f"{expected.sentence}\n")
    assert document(base, "--device", "cpu", "--memory", str(room + 1))["would_fit"] is None


def test_of_a_paged_optimizer_it_is_said_what_the_peak_does_not_count(
    write_run: WriteRun,
) -> None:
    file = write_run(train='context_length = 64\noptimizer = "paged_adamw"')

    rows = [" ".join(line.split()) for line in run(file, "--device", "cuda").stdout.splitlines()]

    said = size(document(file, "--device", "cuda")["memory"]["optimizer_bytes"])
    assert "│ optimizer │ 0.0 MiB │" in rows
    assert f"│ optimizer in host memory meanwhile │ {said} │" in rows


def test_nothing_is_said_of_fitting_where_there_is_no_gpu_and_no_memory_given(base: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")

    found = document(base)

    assert (found["device"], found["fits"]) == ("cpu", None)


def test_a_config_whose_text_part_is_no_object_ends_in_a_sentence_or_an_estimate(
    tmp_path: Path, base: Path
) -> None:
    config = json.loads((base / "config.json").read_text()) | {"text_config": [1]}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))

    result = run(file)

    assert result.exit_code in (0, 2)
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_what_the_user_did_wrong_is_one_sentence(
    tmp_path: Path, base: Path, write_run: WriteRun
) -> None:
    assert "there is no" in refusal(tmp_path / "nowhere")
    assert "nowhere.toml: No such file" in refusal(tmp_path / "nowhere.toml")
    assert "a size is written such as 24GiB" in refusal(base, "--memory", "much")
    assert "card" in refusal(base, "--device", "cuda", "--card", "abacus")
    assert "model.quantize is false" in refusal(write_run(model="quantize = false"))
    file = write_run()
    (tmp_path / "train.jsonl").write_text("{}\n")
    assert "train.jsonl: Unexpected file format" in refusal(file)


def test_a_model_is_estimated_without_torch(base: Path) -> None:
    script = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from qlora_core.commands import app\n"
        "done = CliRunner().invoke(app, ['estimate', sys.argv[1], '--memory', '1MiB'])\n"
        "assert done.exit_code == 0, done.output\n"
        "assert 'torch' not in sys.modules\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", script, base], capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stderr
