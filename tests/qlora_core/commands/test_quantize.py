"""`python -m qlora_core quantize`, from the arguments to the folder."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from shutil import copyfile

import pytest
import torch
from typer.testing import CliRunner, Result

from qlora_core import NF4Linear, load_model
from qlora_core.commands import app
from qlora_core.models.header import write_header
from tests.qlora_core.models.families import save_tiny
from tests.tiny_models import save_tiny_llama, save_tiny_qwen2

IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


def refusal(*arguments: object) -> str:
    result = run(*arguments)

    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "llama")


def test_the_folder_holds_the_model_that_load_model_would_have_made(
    tmp_path: Path, llama: Path
) -> None:
    result = run(llama, tmp_path / "nf4")

    assert result.exit_code == 0, result.output
    one, other = (
        load_model(folder, device="cpu", compute_dtype=torch.float32)
        for folder in (llama, tmp_path / "nf4")
    )
    assert torch.equal(one(IDS).logits, other(IDS).logits)
    assert (tmp_path / "nf4" / "tokenizer_config.json").is_file()


def test_the_table_says_what_it_cost_and_what_it_gained(tmp_path: Path, llama: Path) -> None:
    out = run(llama, tmp_path / "nf4", "--block-size", 64).stdout

    # 2 layers of 4 x 64 x 64 (half of it for keys and values) and 3 x 64 x 96; two of 384 x 64; five norms
    assert "0.06 M" in out
    assert "embeddings and head │ 0.05 M" in out
    before = (llama / "model.safetensors").stat().st_size / 2**20
    assert f"{before:,.1f} MiB before" in out
    for row in ("parameters", "bits per parameter", "time", "peak memory"):
        assert row in out


def test_the_folders_name_is_shown_as_it_is_and_other_files_are_not_counted(
    tmp_path: Path, llama: Path
) -> None:
    before = (llama / "model.safetensors").stat().st_size / 2**20
    copyfile(llama / "model.safetensors", llama / "consolidated.safetensors")

    out = run(llama, tmp_path / "[red]nf4[/red]").stdout

    assert "[red]nf4[/red]" in out.replace("\n", "")
    assert f"{before:,.1f} MiB before" in out


def test_the_options_arrive(tmp_path: Path, llama: Path) -> None:
    result = run(
        llama,
        tmp_path / "nf4",
        *("--block-size", 128, "--no-double-quant", "--scale", "mse", "--device", "cpu"),
        *("--skip-module", "down_proj", "--skip-module", "q_proj", "--quantize-head"),
    )

    assert result.exit_code == 0, result.output
    model, expected = (
        load_model(
            folder,
            device="cpu",
            compute_dtype=torch.float32,
            block_size=128,
            double_quant=False,
            scale="mse",
            skip_modules=("down_proj", "q_proj"),
        )
        for folder in (tmp_path / "nf4", llama)
    )
    layer = model.get_submodule("lm_head")
    assert isinstance(layer, NF4Linear)
    assert (layer.block_size, layer.nested_absmax) == (128, None)
    assert torch.equal(model(IDS).logits, expected(IDS).logits)


def test_a_head_that_cannot_be_quantized_is_told(tmp_path: Path, llama: Path) -> None:
    tied = save_tiny_qwen2(tmp_path / "qwen2")

    told = run(tied, tmp_path / "one", "--quantize-head")
    unasked = run(tied, tmp_path / "two")
    untied = run(llama, tmp_path / "three", "--quantize-head")

    assert told.exit_code == 0, told.output
    assert "The output head is the embeddings' own weight, which stays as it is." in told.stderr
    assert "output head" not in unasked.stderr + untied.stderr


def test_what_stays_dense_keeps_the_dtype_that_the_weights_have(
    tmp_path: Path, llama: Path
) -> None:
    load_model(llama, device="cpu", compute_dtype=torch.bfloat16, quantize=False).save_pretrained(
        tmp_path / "bf16"
    )

    assert run(tmp_path / "bf16", tmp_path / "nf4").exit_code == 0

    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "nf4" / "model.safetensors")
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    assert tensors["model.norm.weight"].dtype == torch.bfloat16


def test_a_folder_with_files_in_it_is_replaced_only_when_forced(
    tmp_path: Path, llama: Path
) -> None:
    (tmp_path / "nf4").mkdir()
    (tmp_path / "nf4" / "mine.txt").write_text("keep")

    assert "has files in it" in refusal(llama, tmp_path / "nf4")
    assert [path.name for path in (tmp_path / "nf4").iterdir()] == ["mine.txt"]

    assert run(llama, tmp_path / "nf4", "--force").exit_code == 0
    assert not (tmp_path / "nf4" / "mine.txt").exists()
    assert (tmp_path / "nf4" / "model.safetensors").is_file()


def test_what_the_user_did_wrong_is_one_sentence_and_nothing_is_written(
    tmp_path: Path, llama: Path
) -> None:
    out = tmp_path / "nf4"

    assert "there is no model folder" in refusal(tmp_path / "nowhere", out)
    assert "block_size must be one of" in refusal(llama, out, "--block-size", 48)
    assert "no linear layers" in refusal(llama, out, "--skip-module", "model")
    assert "it has down_proj" in refusal(llama, out, "--skip-module", "down_prj")
    assert "holds the model" in refusal(llama, llama, "--force")
    if not torch.cuda.is_available():
        assert "no CUDA device" in refusal(llama, out, "--device", "cuda")
    assert not out.exists()


def test_a_model_that_could_not_be_saved_is_refused_before_its_weights_are_read(
    tmp_path: Path,
) -> None:
    save_tiny("mixtral", tmp_path / "mixtral")
    save_tiny("falcon", tmp_path / "falcon")
    for family in ("mixtral", "falcon"):
        with (tmp_path / family / "model.safetensors").open("r+b") as file:
            file.seek(-1000, os.SEEK_END)
            file.write(b"\xff" * 1000)  # not finite, if it were read

    assert "experts in NF4, for which bitsandbytes has no form" in refusal(
        tmp_path / "mixtral", tmp_path / "nf4"
    )
    assert "is a FalconLinear" in refusal(tmp_path / "falcon", tmp_path / "nf4")


def test_experts_can_be_left_dense(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "mixtral")

    result = run(
        tmp_path / "mixtral",
        tmp_path / "nf4",
        "--skip-module",
        "experts",
    )

    assert result.exit_code == 0, result.output
    model = load_model(tmp_path / "nf4", device="cpu", compute_dtype=torch.float32)
    assert isinstance(model.get_submodule("model.layers.0.self_attn.q_proj"), NF4Linear)
    assert not isinstance(model.get_submodule("lm_head"), NF4Linear)


def test_a_model_that_is_in_nf4_already_is_refused(tmp_path: Path, llama: Path) -> None:
    assert run(llama, tmp_path / "nf4").exit_code == 0

    assert "is in NF4 already" in refusal(tmp_path / "nf4", tmp_path / "again")


def test_a_place_that_cannot_be_written_to_is_one_sentence(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "file").write_text("")

    assert "file is a file, so there can be no folder" in refusal(llama, tmp_path / "file" / "nf4")


def test_help_needs_no_torch() -> None:
    script = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from qlora_core.commands import app\n"
        "assert CliRunner().invoke(app, ['quantize', '--help']).exit_code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stderr


def test_only_the_commands_need_what_prints() -> None:
    engine = Path(__file__).parents[3] / "qlora_core"
    printing = re.compile(r"^\s*(from|import) (typer|rich)\b", re.MULTILINE)

    files = [path for path in engine.rglob("*.py") if printing.search(path.read_text())]

    assert files
    assert {path.parent for path in files} == {engine / "commands"}


def test_ctrl_c_leaves_nothing_half_written(tmp_path: Path, llama: Path) -> None:
    # Zeros that take no room on the disk, but their time to quantize.
    path, rows = llama / "model.safetensors", 2**22
    with path.open("wb") as file:
        file.write(write_header([("lm_head.weight", "F32", (rows, 64))]))
        file.truncate(file.tell() + rows * 64 * 4)
    config = (
        (llama / "config.json").read_text().replace('"vocab_size": 384', f'"vocab_size": {rows}')
    )
    (llama / "config.json").write_text(config)
    program = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "qlora_core",
            "quantize",
            llama,
            tmp_path / "nf4",
            "--quantize-head",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with program:
        try:
            wait_until_it_reads(program, path)
            program.send_signal(signal.SIGINT)
            out, errors = program.communicate(timeout=60)
        finally:
            program.kill()

    assert program.returncode == 130, errors
    assert out == ""
    assert "Traceback" not in errors
    assert {one.name for one in tmp_path.iterdir()} == {"llama"}


def wait_until_it_reads(program: subprocess.Popen[str], path: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and program.poll() is None:
        # What it closes, and its end, may come between the list of its files and a look at one of them.
        with suppress(OSError):
            for link in Path(f"/proc/{program.pid}/fd").iterdir():
                if link.samefile(path):
                    return
        time.sleep(0.01)
    pytest.fail("the program did not open the weights")
