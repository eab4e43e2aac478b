"""What is advised when nothing more frugal is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from qlora_core.train.memory.out_of_memory import out_of_memory
from qlora_core.train.run import Run


@pytest.fixture
def prepared(make_run: Callable[..., Run]) -> Run:
    return make_run(9, optimizer="adamw_8bit", gradient_checkpointing=True)


def test_smaller_passes_are_not_advised_where_one_example_alone_has_failed(prepared: Run) -> None:
    lengths = prepared.dataset.lengths
    longest = max(lengths)
    failed = longest - 1  # not every example has been tried
    prepared.plan = replace(prepared.plan, micro_batch_tokens=4 * longest)
    prepared.loss_of.last_pass = (lengths.index(longest),), failed

    message = out_of_memory(prepared, "in step 1", {}).message

    assert "By the estimate nothing fits" in message  # shorter than these no context is advised
    assert "micro_batch_tokens = " not in message
