"""Every error that a user can meet ends a command in one sentence; a mistake of ours stays a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from qlora_core.commands.endings import guarded
from qlora_core.errors import ConfigError


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ConfigError("block_size is wrong"), "block_size is wrong"),
        (OSError(28, "No space left on device", "weights"), "weights: No space left on device"),
        (OSError(28, "No space left on device", "from", None, "to"), "to: No space left on device"),
        (OSError("odd"), "a file: odd"),
        (MemoryError(), "too little memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "too little memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "too little memory"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "too little memory"),
    ],
    ids=repr,
)
def test_an_error_is_a_sentence_on_stderr_and_code_2(
    error: Exception, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @guarded
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as ending:
        command()

    told = capsys.readouterr()
    assert ending.value.exit_code == 2
    assert told.out == ""
    assert sentence in told.err
    assert told.err.count("\n") == 1
    assert "--device" not in told.err  # not every command has it


def test_an_interruption_ends_with_130_and_no_words(capsys: pytest.CaptureFixture[str]) -> None:
    @guarded
    def command() -> None:
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as ending:
        command()

    assert ending.value.exit_code == 130
    assert capsys.readouterr().err == ""


def test_a_mistake_of_ours_is_not_hidden() -> None:
    @guarded
    def command() -> None:
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        command()


@pytest.mark.parametrize("command", ["train", "estimate", "generate", "merge", "quantize"])
def test_without_the_engines_packages_it_says_what_to_install(command: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('output = "x"\n[model]\npath = "x"\n[data]\ntrain = "x"\n')
    arguments = {
        "train": ["run.toml"],
        "estimate": ["run.toml"],
        "generate": ["x", "y"],
        "merge": ["x", "y", "z", "--onto", "original"],
        "quantize": ["x", "y"],
    }
    # As if they were not installed.
    script = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'tokenizers', 'jinja2'): sys.modules[name] = None\n"
        "from qlora_core.commands import main\n"
        "main()\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", script, command, *arguments[command]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )

    assert done.returncode == 2, done.stderr
    assert "pip install 'nibble[engine]'" in done.stderr
    assert "Traceback" not in done.stderr
