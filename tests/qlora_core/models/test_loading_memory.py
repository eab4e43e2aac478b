"""Loading holds no more than the result and two of the largest tensor, watched from outside the process."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig

from qlora_core.models.files import find_weights

# What a process needs besides: the threads' own buffers, Python's objects, the allocator's rests.
MARGIN_BYTES = 16 * 2**20
# More than the tables that quantizing makes at its first use.
MAPPED_BYTES = 24 * 2**20
PROGRAM = """
import sys, torch
from pathlib import Path
from qlora_core import quantize_nf4
from qlora_core.models.loading import load_model
quantize_nf4(torch.randn(512, 512))
print("ready", flush=True)
sys.stdin.readline()
model = load_model(
    Path(sys.argv[1]), device="cpu", compute_dtype=torch.bfloat16, quantize=sys.argv[2] == "nf4"
)
tensors = {one.data_ptr(): one.nbytes for one in [*model.parameters(), *model.buffers()]}
print(sum(tensors.values()), flush=True)
sys.stdin.readline()
"""


LLAMA = LlamaConfig(
    vocab_size=16_000,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=13,
    num_attention_heads=8,
    tie_word_embeddings=False,
)
# Stored expert by expert, so that the largest tensor is one expert's matrix, of 1.8 MB; a layer's make 44 MB together.
MIXTRAL = MixtralConfig(
    vocab_size=1_000,
    hidden_size=512,
    intermediate_size=1792,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    num_local_experts=8,
)


@pytest.fixture(scope="module", params=[LLAMA, MIXTRAL], ids=lambda config: config.model_type)
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A model of more than 60 million parameters, 120 MB or more in seven shards or more."""
    config: PreTrainedConfig = request.param
    folder = tmp_path_factory.mktemp("model")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20MB")
    assert len(list(folder.glob("*.safetensors"))) >= 6
    return folder


@pytest.mark.parametrize("form", ["nf4", "dense"])
def test_memory_stays_within_the_result_and_two_of_the_largest_tensor(
    folder: Path, form: str
) -> None:
    largest_bytes = max(place.nbytes for place in find_weights(folder).places.values())

    before, peak, result_bytes = watch(folder, form)

    assert result_bytes > (30_000_000 if form == "nf4" else 100_000_000)
    assert peak[0] - before[0] <= result_bytes + 2 * largest_bytes + MARGIN_BYTES
    assert peak[1] - before[1] <= MAPPED_BYTES


def watch(folder: Path, form: str) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Load in a process of its own; give what it held before, at its peak, and the result's bytes."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, folder, form],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        before = resident(program.pid)
        os.set_blocking(program.stdout.fileno(), False)
        program.stdin.write("go\n")
        program.stdin.flush()
        peak, told = before, ""
        while not told and program.poll() is None:
            now = resident(program.pid)
            peak = (max(peak[0], now[0]), max(peak[1], now[1]))
            told = program.stdout.readline()
            time.sleep(0.001)
        program.stdin.write("end\n")
        program.stdin.close()
    return before, peak, int(told)


def resident(pid: int) -> tuple[int, int]:
    """Give a process's resident bytes: anonymous ones, and those of mapped files."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    anonymous, mapped = (int(fields[kind].split()[0]) * 1024 for kind in ("RssAnon", "RssFile"))
    return anonymous, mapped
