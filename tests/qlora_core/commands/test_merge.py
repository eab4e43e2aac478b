"""`python -m qlora_core merge`, from the arguments to a checkpoint that transformers loads."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from qlora_core import load_adapter, load_model
from qlora_core.commands import app
from tests.qlora_core.commands.adapters import save_strong_adapter

IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


def refusal(*arguments: object) -> str:
    result = run(*arguments)

    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_strong_adapter(base, tmp_path / "adapter")


def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_the_checkpoint_answers_as_the_chosen_base_with_the_adapter(
    base: Path, adapter: Path, tmp_path: Path, onto: str
) -> None:
    result = run(base, adapter, tmp_path / "merged", "--onto", onto)

    assert result.exit_code == 0, result.output
    model = load_model(
        base, device="cpu", compute_dtype=torch.float32, quantize=onto == "dequantized"
    )
    load_adapter(model, adapter)
    with torch.no_grad():
        expected = model(IDS).logits
    torch.testing.assert_close(logits_of(tmp_path / "merged"), expected, atol=1e-4, rtol=1e-4)
    assert f"the {onto} weights" in result.stdout
    assert "largest difference of logits" in result.stdout


def test_the_base_that_was_quantized_is_named_where_the_model_is_in_nf4(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    quantized = tmp_path / "nf4"
    assert CliRunner().invoke(app, ["quantize", str(base), str(quantized)]).exit_code == 0

    result = run(quantized, adapter, tmp_path / "merged", "--onto", "original", "--original", base)
    direct = run(base, adapter, tmp_path / "direct", "--onto", "original")

    assert result.exit_code == direct.exit_code == 0, result.output
    assert torch.equal(logits_of(tmp_path / "merged"), logits_of(tmp_path / "direct"))


def test_the_dtype_can_be_chosen(base: Path, adapter: Path, tmp_path: Path) -> None:
    result = run(base, adapter, tmp_path / "merged", "--onto", "dequantized", "--dtype", "bfloat16")

    assert result.exit_code == 0, result.output
    assert "in bfloat16" in result.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == torch.bfloat16


def test_the_folders_name_is_printed_as_it_is(base: Path, adapter: Path, tmp_path: Path) -> None:
    result = run(base, adapter, tmp_path / "[red]o", "--onto", "original")

    assert "[red]o" in result.stdout.splitlines()[0]


def test_the_base_has_to_be_chosen(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert "--onto" in refusal(base, adapter, tmp_path / "merged")


def test_what_the_user_did_wrong_is_one_sentence_and_nothing_is_written(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    out, other = tmp_path / "merged", tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("keep")

    for sentence, arguments in {
        "there is no model folder": (tmp_path / "nowhere", adapter, out, "--onto", "original"),
        "adapter": (base, tmp_path / "nowhere", out, "--onto", "original"),
        "leave original_folder out": (base, adapter, out, "--onto", "dequantized", "--original", base),
        "which is read": (base, adapter, adapter, "--onto", "original"),
        "has files in it": (base, adapter, other, "--onto", "original"),
    }.items():  # fmt: skip
        told = refusal(*arguments)
        assert sentence in told
        assert told.count("\n") == 1
    assert not out.exists()


def test_what_is_read_is_never_replaced(base: Path, tmp_path: Path) -> None:
    adapter = save_strong_adapter(base, tmp_path / "run" / "adapter")
    original = tmp_path / "original"
    shutil.copytree(base, original)
    quantized = tmp_path / "nf4"
    assert CliRunner().invoke(app, ["quantize", str(base), str(quantized)]).exit_code == 0
    before = every_file(tmp_path)

    for out in (adapter, adapter.parent, original, quantized):
        told = refusal(
            quantized, adapter, out, "--onto", "original", "--original", original, "--force"
        )
        assert "name another folder" in told
        assert every_file(tmp_path) == before


def every_file(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_adapter_trained_over_a_dense_base_is_merged_over_it(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    result = run(base, adapter, tmp_path / "merged", "--onto", "dequantized", "--no-quantize")

    assert result.exit_code == 0, result.output
    model = load_model(base, device="cpu", compute_dtype=torch.float32, quantize=False)
    load_adapter(model, adapter)
    with torch.no_grad():
        expected = model(IDS).logits
    torch.testing.assert_close(logits_of(tmp_path / "merged"), expected, atol=1e-4, rtol=1e-4)


def test_a_wrong_adapter_is_told_before_the_base_is_loaded(base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")

    told = refusal(broken, tmp_path / "nowhere", tmp_path / "out", "--onto", "dequantized")

    assert "nowhere" in told
