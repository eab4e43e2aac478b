"""`python -m qlora_core train`, from the file to the folder, and what a kill or Ctrl-C costs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from qlora_core import load_adapter, load_model
from qlora_core.commands import app
from tests.qlora_core.commands.conftest import WriteRun
from tests.tiny_models import save_tiny_llama, save_tiny_tokenizer

ADAPTER = "adapter/adapter_model.safetensors"
LONG = "n_epochs = 20\nresume_point_every_s = 0.0"  # 60 steps, a resume point after each
RANDOM = "dropout = 0.1"

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def refusal(*arguments: object) -> str:
    result = run(*arguments)

    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def events(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[object]:
    return [event["step"] for event in events(folder) if event["kind"] == "step_metrics"]


def test_the_folder_holds_all_that_a_run_leaves(
    tmp_path: Path, base: Path, write_run: WriteRun
) -> None:
    file = write_run(
        train="n_epochs = 2", data='validation = "valid.jsonl"', model='name = "org/tiny"'
    )

    result = run(file)

    out = tmp_path / "out"
    assert result.exit_code == 0, result.output
    assert {one.name for one in out.iterdir()} == {
        "adapter", "checkpoints", "resume", "config.toml", "inputs.json", "events.jsonl", "loss.png",
    }  # fmt: skip
    assert {one.name for one in (out / "checkpoints").iterdir()} == {"step-3", "step-6"}
    assert (out / "config.toml").read_bytes() == file.read_bytes()
    assert steps(out) == [1, 2, 3, 4, 5, 6]
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/tiny"
    model = load_model(base, device="cpu", compute_dtype=torch.float32)
    assert load_adapter(model, out / "adapter").r == 4


def test_the_result_is_on_stdout_and_how_it_went_on_stderr(
    tmp_path: Path, write_run: WriteRun
) -> None:
    file = write_run(
        train="n_epochs = 1", data='validation = "valid.jsonl"\nsamples = ["Question 7?"]'
    )

    result = run(file)

    of = {event["kind"]: event for event in events(tmp_path / "out")}
    finished = of["run_finished"]
    assert f"{finished['full_valid_loss']:.4f} of the adapter" in result.stdout
    for row in ("trained tokens", "training loss", "peak memory", "loss curve"):
        assert row in result.stdout
    assert "question  Question 7?" in result.stdout
    assert "base      " in result.stdout
    assert "step 3/3 loss" in result.stderr
    assert "validation of the base model: loss" in result.stderr


def test_the_folder_can_be_named_on_the_command_line(tmp_path: Path, write_run: WriteRun) -> None:
    result = run(write_run(train="max_steps = 1"), "--out", tmp_path / "elsewhere")

    assert result.exit_code == 0, result.output
    assert (tmp_path / "elsewhere" / ADAPTER).is_file()
    assert not (tmp_path / "out").exists()


def test_a_text_that_would_steer_the_terminal_is_printed_without_it(
    tmp_path: Path, write_run: WriteRun
) -> None:
    result = run(write_run(train="max_steps = 1", data='samples = ["\\u001b]0;mine\\u0007?"]'))

    assert "question  ]0;mine?" in result.stdout


def test_names_are_printed_as_they_are(tmp_path: Path, write_run: WriteRun) -> None:
    result = run(write_run(train="max_steps = 1"), "--out", tmp_path / "[red]o")

    assert "[red]o" in result.stdout.splitlines()[0]


def test_what_the_user_did_wrong_is_one_sentence_and_is_mended_without_more(
    tmp_path: Path, write_run: WriteRun
) -> None:
    file = write_run()

    assert "nowhere.toml: No such file" in refusal(tmp_path / "nowhere.toml")
    assert "train.n_epochs must be" in refusal(write_run(train="n_epochs = 0"))
    assert "context_length is 999" in refusal(write_run(train="context_length = 999"))
    assert "eval_steps needs a validation set" in refusal(write_run(train="eval_steps = 1"))
    assert "under the name nope" in refusal(write_run(lora='target_modules = ["nope"]'))
    assert "data.samples" in refusal(write_run(data='samples = ["a <|im_end|> b"]'))
    assert "valid.jsonl" in refusal(write_run(data='validation = "../valid.jsonl"'))
    write_run()
    (tmp_path / "train.jsonl").write_text('{"messages": []}\n')
    assert "train.jsonl: Invalid file format. Example 1 has no messages." in refusal(file)
    (tmp_path / "train.jsonl").write_text("")
    assert "train.jsonl: The file is empty." in refusal(file)
    file.write_text(file.read_text().replace('output = "out"', ""))
    assert "output is missing" in refusal(file)
    assert run(write_run(train="max_steps = 1")).exit_code == 0


def test_a_run_may_be_written_beside_its_settings(tmp_path: Path, write_run: WriteRun) -> None:
    file = write_run(train="max_steps = 1")
    own = tmp_path / "own"
    own.mkdir()
    text = file.read_text().replace('output = "out"', 'output = "."')
    text = text.replace('"train.jsonl"', f'"{tmp_path / "train.jsonl"}"')
    (own / "config.toml").write_text(text)

    result = run(own / "config.toml")

    assert result.exit_code == 0, result.output
    assert (own / ADAPTER).is_file()
    assert (own / "config.toml").read_text() == text


def test_a_picture_that_cannot_be_written_does_not_fail_a_run(
    tmp_path: Path, write_run: WriteRun
) -> None:
    file = write_run(train="max_steps = 1")
    assert run(file).exit_code == 0
    (tmp_path / "out" / "loss.png").unlink()
    (tmp_path / "out" / "loss.png").mkdir()

    result = run(file, "--resume")

    assert result.exit_code == 0, result.output
    assert "No loss curve was drawn: " in result.stderr
    assert "trained tokens" in result.stdout
    assert not (tmp_path / "out" / ".loss.png.unfinished").exists()


def test_a_folder_with_a_run_in_it_is_refused_and_left_as_it_is(
    tmp_path: Path, write_run: WriteRun
) -> None:
    file = write_run(train="max_steps = 1")
    assert run(file).exit_code == 0
    before = {one: one.read_bytes() for one in (tmp_path / "out").rglob("*") if one.is_file()}

    assert "has a run in it; go on with it by --resume" in refusal(file)

    assert before == {
        one: one.read_bytes() for one in (tmp_path / "out").rglob("*") if one.is_file()
    }


def test_a_finished_run_that_goes_on_is_finished_with_the_same_adapter(
    tmp_path: Path, write_run: WriteRun
) -> None:
    file = write_run(train="n_epochs = 1", lora=RANDOM)
    assert run(file).exit_code == 0
    adapter = (tmp_path / "out" / ADAPTER).read_bytes()

    assert run(file, "--resume").exit_code == 0

    assert (tmp_path / "out" / ADAPTER).read_bytes() == adapter
    assert steps(tmp_path / "out") == [1, 2, 3]


def test_a_run_goes_on_only_with_the_same_data_model_and_settings(
    tmp_path: Path, base: Path, write_run: WriteRun
) -> None:
    assert run(write_run(train="n_epochs = 1")).exit_code == 0

    told = run(write_run(train="n_epochs = 2"), "--resume").stderr
    assert "belongs to another run: n_epochs is 1 there, 2 here." in told
    file = write_run(train="n_epochs = 1", model="block_size = 128")
    assert "model.block_size is not what it was" in refusal(file, "--resume")
    file = write_run(train="n_epochs = 1", examples=13)
    assert "data.train is not what it was" in refusal(file, "--resume")
    other = save_tiny_llama(tmp_path / "other", seed=1, initializer_range=0.2)
    file = write_run(train="n_epochs = 1")
    file.write_text(file.read_text().replace(str(base), str(other)))
    assert "model.weights is not what it was" in refusal(file, "--resume")


def test_a_run_goes_on_only_with_the_same_tokenizer_and_template_but_with_other_libraries(
    tmp_path: Path, base: Path, write_run: WriteRun
) -> None:
    file = write_run(train="n_epochs = 1")
    own = shutil.copytree(base, tmp_path / "own")
    file.write_text(file.read_text().replace(str(base), str(own)))
    assert run(file).exit_code == 0
    inputs = tmp_path / "out" / "inputs.json"
    inputs.write_text(inputs.read_text().replace(version("tokenizers"), "0.1"))

    assert "tokenizers 0.1, now" in run(file, "--resume").stderr
    (own / "chat_template.jinja").write_text("{{ messages }}")

    assert "model.path/chat_template.jinja is not what it was" in refusal(file, "--resume")


def test_an_adapter_is_trained_on_from_where_it_was(tmp_path: Path, write_run: WriteRun) -> None:
    data = 'validation = "valid.jsonl"'
    assert run(write_run(train="n_epochs = 2", data=data)).exit_code == 0
    file = write_run(train="max_steps = 1", data=data, model='adapter = "out/adapter"')

    result = run(file, "--out", tmp_path / "again")

    assert result.exit_code == 0, result.output
    ended, began = (valid_losses(tmp_path / name) for name in ("out", "again"))
    assert began[0] == pytest.approx(ended[6], rel=1e-6)
    assert ended[6] != pytest.approx(ended[0], rel=1e-2)


def test_plain_text_trains_a_model_without_a_chat_template_but_it_cannot_be_asked(
    tmp_path: Path, base: Path, write_run: WriteRun
) -> None:
    bare = save_tiny_llama(tmp_path / "bare", initializer_range=0.2)
    save_tiny_tokenizer(bare, chat_template=None)
    (tmp_path / "text.jsonl").write_text('{"text": "A nibble is four bits."}\n' * 4)

    def bare_run(**options: str) -> Path:
        file = write_run(train="max_steps = 1", **options)
        text = file.read_text().replace(str(base), str(bare)).replace("train.jsonl", "text.jsonl")
        file.write_text(text)
        return file

    assert "no chat template" in refusal(bare_run(data='samples = ["What?"]'))
    assert run(bare_run()).exit_code == 0


def test_a_run_that_was_killed_goes_on_and_ends_in_the_same_adapter_to_the_bit(
    tmp_path: Path, write_run: WriteRun
) -> None:
    file = write_run(train=LONG, lora=RANDOM, data='validation = "valid.jsonl"')
    with started(file) as program:
        wait_for_step(program, tmp_path / "out", 2)
        program.kill()
        program.wait(timeout=60)
    assert not (tmp_path / "out" / "adapter").exists()

    resumed = run(file, "--resume")
    unbroken = run(file, "--out", tmp_path / "unbroken")

    assert resumed.exit_code == unbroken.exit_code == 0, resumed.output
    assert "going on after step" in resumed.stderr
    ours, theirs = (load_file(tmp_path / name / ADAPTER) for name in ("out", "unbroken"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert losses(tmp_path / "out") == losses(tmp_path / "unbroken")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_resume_point_and_says_how_to_go_on(
    tmp_path: Path, write_run: WriteRun, number: signal.Signals, code: int
) -> None:
    file = write_run(train="n_epochs = 1000").rename(tmp_path / "my run.toml")
    with started(file) as program:
        wait_for_step(program, tmp_path / "out", 2)
        program.send_signal(number)
        out, errors = program.communicate(timeout=60)

    assert program.returncode == code, errors
    assert out == ""
    assert "Traceback" not in errors
    assert "Stopping after this step" in errors
    (last,) = (event for event in events(tmp_path / "out")[-1:])
    assert last["kind"] == "resume_point_saved"
    assert f"Stopped after step {last['step']}" in errors.replace(",", "")
    assert f"python -m qlora_core train '{file}' --resume" in errors
    assert (tmp_path / "out" / "loss.png").is_file()


def test_a_run_outlives_whoever_read_its_messages(tmp_path: Path, write_run: WriteRun) -> None:
    file = write_run(train="n_epochs = 1000")
    with started(file) as program:
        assert program.stderr is not None
        assert program.stderr.readline()
        program.stderr.close()
        wait_for_step(program, tmp_path / "out", 2)
        program.send_signal(signal.SIGINT)
        program.wait(timeout=60)

    assert program.returncode == 130
    assert events(tmp_path / "out")[-1]["kind"] == "resume_point_saved"
    assert (tmp_path / "out" / "loss.png").is_file()


def started(file: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qlora_core", "train", file],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_step(program: subprocess.Popen[str], folder: Path, step: int) -> None:
    wait_until(program, lambda: (folder / "events.jsonl").is_file() and has_done(folder, step))


def has_done(folder: Path, step: int) -> bool:
    return f'"kind": "step_metrics", "step": {step}' in (folder / "events.jsonl").read_text()


def wait_until(program: subprocess.Popen[str], true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and program.poll() is None:
        if true():
            return
        time.sleep(0.01)
    program.kill()
    pytest.fail(f"the run came to no such step: {program.communicate()[1]}")


def valid_losses(folder: Path) -> dict[object, object]:
    return {
        event["step"]: event["full_valid_loss"]
        for event in events(folder)
        if event["kind"] == "validation_metrics"
    }


def losses(folder: Path) -> dict[object, object]:
    return {
        event["step"]: event["train_loss"]
        for event in events(folder)
        if event["kind"] == "step_metrics"
    }
