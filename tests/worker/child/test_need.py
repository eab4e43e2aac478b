"""What validation says a job needs of a GPU."""

import json
from pathlib import Path
from typing import Any

from qlora_core.estimate import estimate
from service.jobs.resolve import resolve_hyperparameters
from worker.child.need import memory_needed

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}


class Counted:
    n_examples = 1000


def resolved(**asked: Any) -> dict[str, Any]:
    return resolve_hyperparameters(asked, Counted(), 8192)


def model(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_model_of_eight_billion_needs_its_four_bits_and_some(tmp_path: Path) -> None:
    found = memory_needed(model(tmp_path, **LLAMA), resolved(), longest_tokens=500)

    assert found is not None
    # 7.0e9 quantized weights of half a byte, and 1.05e9 of embeddings and head in bfloat16: 5.6e9; adapter and a step above.
    assert 5.6e9 < found < 9e9


def test_it_is_never_more_than_what_a_run_begins_with(tmp_path: Path) -> None:
    folder = model(tmp_path, **LLAMA)

    found = memory_needed(folder, resolved(batch_size=8), longest_tokens=500)

    planned = estimate(folder, {"batch_size": 8}, longest_tokens=500).memory.total_bytes
    assert found is not None
    assert found < planned


def test_longer_examples_need_more_up_to_the_context_length(tmp_path: Path) -> None:
    folder, asked = model(tmp_path, **LLAMA), resolved(context_length=2048)

    needs = [memory_needed(folder, asked, longest_tokens=n) for n in (1, 512, 2048, 9000)]

    assert needs == sorted(needs, key=lambda need: need or 0)
    assert needs[1] != needs[2] == needs[3]


def test_every_hyperparameter_that_a_job_can_have_is_understood(tmp_path: Path) -> None:
    asked = resolved(
        lora_target_modules=["q_proj", "v_proj"],
        lora_exclude_modules=["layers.0.self_attn.q_proj"],
        lora_dropout=0.1,
        lora_use_rslora=True,
        max_steps=5,
        warmup_steps=2,
        packing=False,
        optimizer="paged_adamw_8bit",
    )

    assert memory_needed(model(tmp_path, **LLAMA), asked, longest_tokens=64) is not None


def test_of_a_model_that_the_estimate_does_not_know_the_need_is_unknown(tmp_path: Path) -> None:
    folder = model(tmp_path, model_type="mamba", hidden_size=64, num_hidden_layers=2)

    assert memory_needed(folder, resolved(), longest_tokens=64) is None
