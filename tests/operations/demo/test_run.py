"""`nibble demo`, as people run it, on fewer examples."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import psutil
import pytest

from tests.tiny_models import save_tiny_llama


class Demo:
    """A running demo; what it prints is collected as it comes."""

    def __init__(self, *arguments: str, models_file: Path | None = None) -> None:
        catalog = {} if models_file is None else {"NIBBLE_MODELS_FILE": str(models_file)}
        self.output = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "operations", "demo", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"COLUMNS": "200"} | catalog,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line

    def wait_for(self, text: str, *, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.output:
            assert time.monotonic() < deadline, self.output
            assert self.process.poll() is None, self.output
            time.sleep(0.05)

    def end(self, *, timeout_s: float) -> int:
        status = self.process.wait(timeout_s)
        self._reader.join()
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.end(timeout_s=60)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def demos() -> Iterator[list[Demo]]:
    started: list[Demo] = []
    yield started
    for demo in started:
        demo.close()


def test_it_trains_tells_what_was_learned_and_leaves_only_files(
    demos: list[Demo], tmp_path: Path
) -> None:
    data_dir = tmp_path / "demo"
    demo = Demo("--data-dir", str(data_dir), "--examples", "160", "--epochs", "1")
    demos.append(demo)

    assert demo.end(timeout_s=280) == 0, demo.output

    told = demo.output
    start, end = map(float, re.findall(r"validation \(.+?\) +([\d.]+) +([\d.]+)", told)[0])
    assert end < start
    assert re.search(r"training \(mean of \d+ steps\) +[\d.]+ +[\d.]+", told)
    assert re.search(r"Step \d+/20: loss [\d.]+, [\d,]+ tokens/s, memory [\d.]+ MiB", told)
    assert [told.count(f"\n  {word} ") for word in ("question", "base", "adapter")] == [2, 2, 3]
    assert re.search(r"Swagger +http://127\.0\.0\.1:\d+/docs", told)
    folder = Path(re.findall(r"\n  adapter +(/.+)\n  weights", told)[0])
    weights = (folder / "adapter_model.safetensors").read_bytes()
    assert sha256(weights).hexdigest() in told
    assert f"{len(weights):,} bytes" in told
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    lines = (data_dir / "input" / "train.jsonl").read_text().splitlines()
    assert len(lines) == 160


def test_ctrl_c_stops_every_process_and_a_next_demo_does_not_train_the_old_job(
    demos: list[Demo], tmp_path: Path
) -> None:
    arguments = ("--data-dir", str(tmp_path / "demo"), "--examples", "400")
    demo = Demo(*arguments)
    demos.append(demo)
    demo.wait_for("Fine-tuning job started", timeout_s=120)
    (old_job,) = re.findall(r"Created (ftjob-\w+)\.", demo.output)
    family = psutil.Process(demo.process.pid).children(recursive=True)

    demo.process.send_signal(signal.SIGINT)
    status = demo.end(timeout_s=90)

    assert status == 130
    assert demo.output.endswith("Stopped; nothing is left running.\n")
    assert "Traceback" not in demo.output
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []
    again = Demo(*arguments)
    demos.append(again)
    again.wait_for(f"Cancelled {old_job} of an earlier demo.", timeout_s=120)
    again.process.send_signal(signal.SIGTERM)
    assert again.end(timeout_s=90) == 143


@pytest.mark.slow
def test_another_model_of_the_catalog_is_trained_when_it_is_named(
    demos: list[Demo], tmp_path: Path
) -> None:
    save_tiny_llama(tmp_path / "weights")
    catalog = tmp_path / "models.toml"
    catalog.write_text('[models.random-llama]\npath = "weights"\n')
    asked = ("--model", "random-llama", "--examples", "64", "--epochs", "1")
    demo = Demo(*asked, "--data-dir", str(tmp_path / "demo"), "--json", models_file=catalog)
    demos.append(demo)

    assert demo.end(timeout_s=180) == 0, demo.output

    told = json.loads(demo.output[demo.output.index("\n{\n") : demo.output.rindex("\n}\n") + 3])
    assert told["last_valid_loss"] < told["first_valid_loss"]
    assert told["steps"] == 8
    assert told["job"]["fine_tuned_model"].startswith("ft:random-llama:")
    weights = Path(told["adapter"]["folder"]) / told["adapter"]["weights"]
    assert sha256(weights.read_bytes()).hexdigest() == told["adapter"]["sha256"]
    assert "tiny-llama" not in demo.output


def test_a_model_that_is_not_in_the_catalog_is_refused_before_anything_starts(
    demos: list[Demo], tmp_path: Path
) -> None:
    demo = Demo("--model", "gpt-17", "--data-dir", str(tmp_path / "demo"))
    demos.append(demo)

    assert demo.end(timeout_s=60) == 2

    assert "no model 'gpt-17'" in demo.output
    assert "tiny-llama" in demo.output
    assert not (tmp_path / "demo").exists()
