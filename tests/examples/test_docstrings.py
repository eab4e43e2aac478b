"""The example of a run without the service, shortened, from its data to its adapter."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qlora_core.commands import app
from qlora_core.commands.run_file import read_run_file

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """A copy of the example, with its data made."""
    folder = tmp_path / "docstrings"
    folder.mkdir()
    for name in ("config.toml", "write_data.py"):
        shutil.copyfile(EXAMPLES / "docstrings" / name, folder / name)
    done = subprocess.run(
        [sys.executable, folder / "write_data.py"],
        capture_output=True,
        text=True,
        cwd=EXAMPLES.parent,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_example_trains(example: Path) -> None:
    config, validation = example / "config.toml", example / "validation.jsonl"
    text = config.read_text().replace("../tiny-llama", str(EXAMPLES / "tiny-llama"))
    config.write_text(text.replace("n_epochs = 2", "max_steps = 2"))
    validation.write_text("".join(validation.read_text().splitlines(keepends=True)[:5]))

    result = CliRunner().invoke(app, ["train", str(config)])

    assert result.exit_code == 0, result.output
    assert (example / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert (example / "run" / "loss.png").is_file()


def test_its_settings_are_what_the_repository_has() -> None:
    run = read_run_file(EXAMPLES / "docstrings" / "config.toml")

    assert (run.model.path / "model.safetensors").is_file()
    assert run.config.n_epochs == 2
