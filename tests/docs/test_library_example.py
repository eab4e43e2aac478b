"""The guide to the engine without the service: what it prints as code is run, as it is printed."""

import json
import re
import subprocess
import sys
from pathlib import Path

from qlora_core.commands.run_file import read_run_file

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guides" / "command-line.md"


def test_the_guides_example_trains_and_leaves_what_it_says(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    script = "\n".join(blocks).replace("max_steps=20", "max_steps=2")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    lines = [
        {"messages": [{"role": "user", "content": f"{n} and one?"},
                      {"role": "assistant", "content": f"It is {n + 1}."}]}
        for n in range(20)
    ]  # fmt: skip
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )

    assert len(blocks) == 2
    assert done.returncode == 0, done.stderr
    assert "RunFinished(steps=2" in done.stdout
    assert "LogitDifference(" in done.stdout
    for path in ("run/adapter", "adapter", "merged"):
        assert any((tmp_path / path).glob("*.safetensors")), path


def test_the_guides_file_of_settings_is_one(tmp_path: Path) -> None:
    (toml,) = re.findall(r"```toml\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    file = tmp_path / "config.toml"
    file.write_text(toml)

    run = read_run_file(file)

    assert (run.config.n_epochs, run.config.lora.r) == (2, 16)
