"""The estimate's bytes against those of every tensor of a real training step, counted one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from qlora_core import TrainConfig, estimate
from qlora_core.estimate import Estimate
from qlora_core.optim import OPTIMIZERS
from tests.qlora_core.estimate.families import FAMILIES, config_of
from tests.qlora_core.estimate.measured_step import Measured, measure_step

_KINDS = ("base", "adapter", "optimizer", "gradients", "activations", "workspace", "total")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def both(
    family: str,
    lengths: list[int],
    folder: Path,
    *,
    changes: dict[str, Any] | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    inputs_on_host: bool = False,
    **options: Any,
) -> tuple[Estimate, Measured]:
    """Give the estimate of a run and what one step of it took."""
    config = config_of(family, **(changes or {}))
    settings = TrainConfig.from_dict(
        {
            "batch_size": len(lengths),
            "context_length": max(lengths),
            "micro_batch_tokens": 512,
            **options,
        }
    )
    estimated = estimate(
        config.to_dict(),
        settings,
        device="cpu",
        compute_dtype=dtype,
        longest_tokens=max(lengths),
        mean_tokens=sum(lengths) / len(lengths),
        inputs_on_host=inputs_on_host,
    )
    measured = measure_step(
        config,
        settings,
        lengths,
        folder,
        getattr(torch, dtype),
        inputs_on_host=inputs_on_host,
    )
    return estimated, measured


def assert_close(estimated: Estimate, measured: Measured) -> None:
    """Hold each kind that is a twentieth of the whole or more, and the whole, to what was counted.

    A random mixture's routers do not spread the tokens evenly, as the estimate has them.
    """
    within = 0.1 if any("experts" in one for one in estimated.assumed) else 0.05
    found = estimated.memory.as_dict()
    for kind in _KINDS:
        real = getattr(measured, f"{kind}_bytes")
        if real >= measured.total_bytes / 20:
            ratio = found[f"{kind}_bytes"] / real
            assert abs(ratio - 1) <= within, f"{kind}: {ratio:.3f} of {real:,} bytes"


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "kept"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_what_is_estimated(
    family: str, checkpointing: bool, packing: bool, tmp_path: Path
) -> None:
    estimated, measured = both(
        family,
        [170, 170, 170, 170],
        tmp_path,
        packing=packing,
        gradient_checkpointing=checkpointing,
    )

    assert estimated.passes_per_step == 2
    assert_close(estimated, measured)


_ADAPTERS: dict[str, dict[str, Any]] = {
    "rank 64": {"lora": {"r": 64}},
    "dropout": {"lora": {"r": 8, "dropout": 0.1}},
    "two layers": {"lora": {"r": 8, "target_modules": ["q_proj", "down_proj"]}},
    "embeddings": {"lora": {"r": 8, "modules_to_save": ["embed_tokens", "lm_head"]}},
    "head kept": {
        "lora": {"r": 8, "modules_to_save": ["lm_head"]},
        "gradient_checkpointing": False,
    },
    "padded": {"lora": {"r": 8, "dropout": 0.1}, "gradient_checkpointing": False, "packing": False},
}


@pytest.mark.parametrize("adapter", _ADAPTERS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_adapters_take_what_is_estimated(family: str, adapter: str, tmp_path: Path) -> None:
    estimated, measured = both(family, [170, 170, 170, 170], tmp_path, **_ADAPTERS[adapter])

    assert_close(estimated, measured)


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "kept"])
def test_layers_below_the_first_adapter_keep_no_more_than_their_input(
    checkpointing: bool, tmp_path: Path
) -> None:
    estimated, measured = both(
        "llama",
        [170, 170, 170, 170],
        tmp_path,
        changes={"num_hidden_layers": 12},
        gradient_checkpointing=checkpointing,
        lora={"r": 8, "target_modules": r".*layers\.11\..*_proj"},
    )

    assert_close(estimated, measured)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_takes_what_is_estimated(optimizer: str, tmp_path: Path) -> None:
    estimated, measured = both(
        "llama", [170, 170, 170, 170], tmp_path, optimizer=optimizer, lora={"r": 96}
    )

    assert measured.optimizer_bytes > measured.total_bytes / 20
    assert estimated.memory.optimizer_bytes == measured.optimizer_bytes
    assert_close(estimated, measured)


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "kept"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_is_kept_on_the_host_is_not_counted(
    family: str, checkpointing: bool, tmp_path: Path
) -> None:
    estimated, measured = both(
        family,
        [1000],
        tmp_path,
        changes={"num_hidden_layers": 12},
        gradient_checkpointing=checkpointing,
        inputs_on_host=True,
        micro_batch_tokens=1000,
        lora={"r": 4},
    )

    assert_close(estimated, measured)


def test_an_adapter_over_the_head_is_counted(tmp_path: Path) -> None:
    lora = {"r": 8, "target_modules": ["lm_head", "o_proj"]}

    estimated, measured = both("llama", [170, 170, 170, 170], tmp_path, lora=lora)

    assert_close(estimated, measured)


@pytest.mark.parametrize(
    "lengths",
    [[24] * 6, [499], [499, 499], [300, 90, 90], [40, 300, 30, 50, 20, 90]],
    ids=["short", "one example", "one a pass", "one pass of three", "uneven"],
)
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "kept"])
def test_steps_of_any_shape_take_what_is_estimated(
    lengths: list[int], checkpointing: bool, tmp_path: Path
) -> None:
    estimated, measured = both(
        "qwen3", lengths, tmp_path, gradient_checkpointing=checkpointing, micro_batch_tokens=500
    )

    assert_close(estimated, measured)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "kept"])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
def test_masks_of_a_window_are_counted(
    family: str, checkpointing: bool, packing: bool, tmp_path: Path
) -> None:
    estimated, measured = both(
        family,
        [250, 250],
        tmp_path,
        changes={"sliding_window": 40},
        packing=packing,
        gradient_checkpointing=checkpointing,
    )

    assert_close(estimated, measured)


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "kept"])
def test_a_large_vocabulary_is_there_in_chunks(checkpointing: bool, tmp_path: Path) -> None:
    estimated, measured = both(
        "llama",
        [300, 300],
        tmp_path,
        changes={"vocab_size": 70_001, "hidden_size": 32, "intermediate_size": 64},
        micro_batch_tokens=600,
        gradient_checkpointing=checkpointing,
    )

    assert_close(estimated, measured)


def test_a_tied_matrix_is_trained_and_counted_once(tmp_path: Path) -> None:
    estimated, measured = both(
        "llama",
        [170, 170, 170, 170],
        tmp_path,
        changes={"vocab_size": 6007, "tie_word_embeddings": True},
        lora={"r": 8, "modules_to_save": ["embed_tokens"]},
    )

    assert_close(estimated, measured)


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "kept"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2", "qwen2_moe"])
def test_half_precision_takes_what_is_estimated(
    family: str, checkpointing: bool, tmp_path: Path
) -> None:
    estimated, measured = both(
        family,
        [170, 170, 170, 170],
        tmp_path,
        dtype="bfloat16",
        gradient_checkpointing=checkpointing,
        lora={"r": 8, "dropout": 0.1},
    )

    assert_close(estimated, measured)
