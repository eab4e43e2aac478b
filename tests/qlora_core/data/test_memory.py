"""The memory of a dataset does not grow with the text of its file. In processes of their own, for their peak's sake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import save_tiny_tokenizer

REPOSITORY = Path(__file__).parents[3]
PEAK = (
    "from pathlib import Path\n"
    "def peak_mb():\n"
    "    lines = Path('/proc/self/status').read_text().splitlines()\n"
    "    return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) / 1000\n"
)


def _run(code: str, *arguments: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PEAK + code, *map(str, arguments)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def test_tokens_of_four_hundred_megabytes_are_kept_and_drawn_in_forty(tmp_path: Path) -> None:
    code = """
import json, random, sys
from array import array
from qlora_core.data import Batching, epoch_order, windows
from qlora_core.data.dataset import Dataset, Examples
from qlora_core.data.tokens import TokenStore
from qlora_core.text.scanning import Scanned

examples = Examples(TokenStore(folder=Path(sys.argv[1]), in_memory_bytes=1 << 20))
part = Scanned(tokens=array("i", [~7] * 1_000_000), lengths=array("i", [1000] * 1000),
               trained_counts=array("i", [999] * 1000), lines=array("q", range(1000)))
before = peak_mb()
for _ in range(100):
    examples.add(part)
dataset, drawn = Dataset(examples, None), 0
batching = Batching(max_tokens=4000, packed=True, pad_id=0, pass_tokens=64)
for window in windows(epoch_order(len(dataset), seed=0, epoch=0), 32)[:200]:
    drawn += sum(batch.n_tokens for batch in batching.split(dataset, window))
print(json.dumps({"tokens": sum(dataset.lengths), "drawn": drawn, "grown_mb": peak_mb() - before}))
"""

    found = _run(code, tmp_path)

    assert (found["tokens"], found["drawn"]) == (100_000_000, 6_400_000)
    assert found["grown_mb"] < 40


@pytest.mark.slow
def test_a_file_of_forty_megabytes_is_loaded_in_twenty_five(tmp_path: Path) -> None:
    folder = save_tiny_tokenizer(tmp_path / "model")
    line = json.dumps({"messages": [{"role": "user", "content": "What does it return?"},
                                    {"role": "assistant", "content": "the length of an object " * 30}]})  # fmt: skip
    path = tmp_path / "train.jsonl"
    path.write_text((line + "\n") * (40_000_000 // len(line)), encoding="utf-8")
    code = """
import itertools, json, sys
from qlora_core import TextEncoder, load_dataset

encoder, folder = TextEncoder.from_folder(sys.argv[1]), Path(sys.argv[3])
load = lambda path: load_dataset(path, encoder, context_length=512, processes=2, folder=folder, in_memory_bytes=1 << 20)
small = folder / "small.jsonl"
with open(sys.argv[2]) as file:
    small.write_text("".join(itertools.islice(file, 3000)))
load(small)
before = peak_mb()
dataset = load(sys.argv[2])
print(json.dumps({"tokens": sum(dataset.lengths), "grown_mb": peak_mb() - before}))
"""

    found = _run(code, folder, path, tmp_path)

    assert found["tokens"] * 4 > 25_000_000
    assert found["grown_mb"] < 25
