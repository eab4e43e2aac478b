"""Which weight files of a folder are read."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_core import load_model
from tests.tiny_models import save_tiny_llama


def test_of_a_single_file_and_an_index_the_file_is_read_as_transformers_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_tiny_llama(tmp_path / "model", shard_bytes=60_000)
    other = load_file(save_tiny_llama(tmp_path / "other", seed=1) / "model.safetensors")
    save_file(other, folder / "model.safetensors", metadata={"format": "pt"})

    with caplog.at_level(logging.WARNING):
        model = load_model(folder, device="cpu", compute_dtype=torch.float32, quantize=False)

    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(model.get_parameter("lm_head.weight"), other["lm_head.weight"])
    assert torch.equal(
        model.get_parameter("lm_head.weight"), expected.get_parameter("lm_head.weight")
    )
    assert "has both model.safetensors and model.safetensors.index.json" in caplog.text
