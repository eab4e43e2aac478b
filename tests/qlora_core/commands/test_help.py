"""`--help` of every command answers at once: it loads nothing of what the command computes with."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from qlora_core.commands import app

COMMANDS = [command.callback.__name__ for command in app.registered_commands if command.callback]


def test_every_command_is_listed() -> None:
    listed = CliRunner().invoke(app, ["--help"]).stdout

    assert {"train", "estimate", "generate", "merge", "quantize"} <= {*COMMANDS}
    assert [name for name in COMMANDS if name not in listed] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_torch(command: str) -> None:
    script = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from qlora_core.commands import app\n"
        f"assert CliRunner().invoke(app, ['{command}', '--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'triton', 'matplotlib', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stderr
