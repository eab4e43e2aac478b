"""What a model is made of, counted by hand for small ones."""

from pathlib import Path

import torch

from qlora_core import load_model
from qlora_core.models.census import take_census
from tests.qlora_core.models.families import save_tiny
from tests.tiny_models import save_tiny_llama, save_tiny_qwen2

ATTENTION = 2 * 64 * 64 + 2 * 64 * 32
MLP = 3 * 64 * 96
NORMS = 5 * 64


def test_a_model_with_a_head_of_its_own(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path)

    census = take_census(load_model(folder, device="cpu", compute_dtype=torch.bfloat16))

    assert census.quantized == 2 * (ATTENTION + MLP)
    assert (census.embeddings, census.others) == (2 * 384 * 64, NORMS)
    assert census.parameters == 2 * (ATTENTION + MLP) + 2 * 384 * 64 + NORMS
    assert census.dense_bytes == 2 * (2 * 384 * 64 + NORMS)
    # Seven layers twice, with 4 bytes of offset and less than a nested block each.
    assert 4.127 < census.quantized_bits < 4.2
    assert census.bits == 8 * (census.quantized_bytes + census.dense_bytes) / census.parameters


def test_a_shared_head_counts_once_and_biases_are_others(tmp_path: Path) -> None:
    folder = save_tiny_qwen2(tmp_path)

    census = take_census(load_model(folder, device="cpu", compute_dtype=torch.float32))

    assert census.embeddings == 384 * 64
    assert census.others == NORMS + 2 * (64 + 32 + 32)


def test_experts_count_as_many_times_as_there_are(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path)

    census = take_census(load_model(tmp_path, device="cpu", compute_dtype=torch.float32))

    assert census.quantized == 2 * (ATTENTION + 4 * 3 * 64 * 128)


def test_a_dense_model_has_no_bits_in_nf4(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path)

    census = take_census(
        load_model(folder, device="cpu", compute_dtype=torch.float32, quantize=False)
    )

    assert (census.quantized, census.quantized_bits, census.bits) == (0, 0.0, 32.0)
