"""Twenty steps beside bitsandbytes and peft, from one checkpoint in NF4: the loss curves lie within 1% of each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.qlora_core.train.beside_bitsandbytes import two_curves, worst
from tests.qlora_core.train.plain_loop import STEPS
from tests.tiny_models import save_tiny_llama

TINY_LLAMA = Path(__file__).parents[3] / "examples" / "tiny-llama"


# peft 0.21 asks transformers 5.23 by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")
@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-2)], ids=str
)
@pytest.mark.parametrize("base", ["random", "pre-trained"])
def test_every_steps_loss_is_within_one_percent_of_bitsandbytes_and_pefts(
    base: str, dtype: torch.dtype, allowed: float, tmp_path: Path
) -> None:
    dense = TINY_LLAMA
    if base == "random":
        dense = save_tiny_llama(tmp_path / "base", intermediate_size=128, initializer_range=0.2)

    theirs, ours = two_curves(dense, tmp_path, dtype=dtype, rate=3e-3)

    assert len(ours) == STEPS
    assert worst(ours, theirs) < allowed
    assert theirs[-1] < theirs[0] - 2
