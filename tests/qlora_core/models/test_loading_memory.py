"""Loading holds no more than the result, two of the largest tensor and a fixed amount, watched from outside the process."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig

from bench.watching import watch
from qlora_core.models.files import find_weights

# What a process needs besides, however large the model: a thread's working memory, Python's objects, the allocator's rests.
MARGIN_BYTES = 24 * 2**20
# More than the tables that quantizing makes at its first use.
MAPPED_BYTES = 24 * 2**20
PROGRAM = """
import json, sys, torch
from pathlib import Path
from qlora_core import quantize_nf4
from qlora_core.models.loading import load_model
torch.set_num_threads(1)
quantize_nf4(torch.randn(512, 512))
print("ready", flush=True)
sys.stdin.readline()
model = load_model(
    Path(sys.argv[1]), device="cpu", compute_dtype=torch.bfloat16, quantize=sys.argv[2] == "nf4"
)
tensors = {one.data_ptr(): one.nbytes for one in [*model.parameters(), *model.buffers()]}
print(json.dumps({"result_bytes": sum(tensors.values())}), flush=True)
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
# Stored expert by expert, so that the largest tensor is one expert's matrix, of 14 MiB: two of them are more than the
# margin, and those that transformers stacks at once, six of a layer, more than both.
MIXTRAL = MixtralConfig(
    vocab_size=1_000,
    hidden_size=1024,
    intermediate_size=7168,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    num_local_experts=3,
)


@pytest.fixture(scope="module", params=[LLAMA, MIXTRAL], ids=lambda config: config.model_type)
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A model of more than 60 million parameters, 120 MB or more in six shards or more."""
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

    watched = watch([sys.executable, "-c", PROGRAM, folder, form])

    result_bytes = watched.told["result_bytes"]
    assert result_bytes > (30_000_000 if form == "nf4" else 100_000_000)
    assert watched.above["RssAnon"] <= result_bytes + 2 * largest_bytes + MARGIN_BYTES
    assert watched.above["RssFile"] <= MAPPED_BYTES
