"""What is advised when nothing more frugal is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from qlora_core import Dataset, TextEncoder, TrainConfig
from qlora_core.train.memory.out_of_memory import out_of_memory
from qlora_core.train.run import Run, prepare


@pytest.fixture
def prepared(
    load: Callable[[], PreTrainedModel],
    encoder: TextEncoder,
    config: Callable[..., TrainConfig],
    make_dataset: Callable[..., Dataset],
    tmp_path: Path,
) -> Run:
    return prepare(
        load(), encoder, make_dataset(9), config(optimizer="adamw_8bit", gradient_checkpointing=True),
        lambda _: None, output_dir=tmp_path, validation=None, sample_prompts=(), base_model=None, adapter=None,
    )  # fmt: skip


def test_smaller_passes_are_not_advised_where_one_example_alone_has_failed(prepared: Run) -> None:
    lengths = prepared.dataset.lengths
    longest = max(lengths)
    failed = longest - 1  # not every example has been tried
    prepared.plan = replace(prepared.plan, micro_batch_tokens=4 * longest)
    prepared.loss_of.last_pass = (lengths.index(longest),), failed

    message = out_of_memory(prepared, "in step 1", {}).message

    assert "By the estimate nothing fits" in message  # shorter than these no context is advised
    assert "micro_batch_tokens = " not in message
