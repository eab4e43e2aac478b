"""Twenty steps beside a plain loop of transformers, peft and torch.optim, from the same NF4 weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_core import Dataset, TextEncoder, TrainConfig, train
from qlora_core.nn import NF4Linear, lora_modules
from qlora_core.train import Event, StepMetrics
from tests.qlora_core.train.plain_loop import adapted_by_peft, plain_loop, settings

RATE = 1e-2


def _reference(base: Path, quantized: Any) -> Any:
    """The same model in peft: the dequantized weights in dense layers, the same start of A."""
    dense: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for path, module in quantized.named_modules():
        if isinstance(module, NF4Linear):
            dense.get_submodule(path).weight.data.copy_(module.nf4.dequantize(torch.float32))
    return adapted_by_peft(dense, quantized)


# peft 0.21 asks transformers 5.23 by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")
@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "linear"),
        ({"packing": False, "gradient_checkpointing": True}, "constant"),
        ({"micro_batch_tokens": 60}, "linear"),
    ],
    ids=["packed", "padded and recomputed", "accumulated"],
)
def test_the_loss_curve_is_that_of_a_plain_loop(
    changes: dict[str, Any],
    kind: str,
    base: Path,
    load: Callable[[], PreTrainedModel],
    encoder: TextEncoder,
    config: Callable[..., TrainConfig],
    make_dataset: Callable[..., Dataset],
    tmp_path: Path,
) -> None:
    # Seven examples in batches of four: every other window is smaller.
    dataset, events, model = make_dataset(7), list[Event](), load()
    reference = _reference(base, load())
    expected = plain_loop(reference, dataset, kind=kind, rate=RATE)

    train(
        model,
        encoder,
        dataset,
        config(**settings(kind=kind, rate=RATE), **changes),
        events.append,
        output_dir=tmp_path,
    )

    steps = [event for event in events if isinstance(event, StepMetrics)]
    losses, norms = zip(*expected, strict=True)
    assert [step.train_loss for step in steps] == pytest.approx(losses, abs=1e-4)
    assert [step.grad_norm for step in steps] == pytest.approx(norms, rel=1e-3)
    assert losses[-1] < losses[0] - 3
    for path, module in lora_modules(model).items():
        theirs = reference.get_submodule(f"base_model.model.{path}")
        for name in ("lora_A", "lora_B"):
            actual, wanted = getattr(module, name), getattr(theirs, name)["default"].weight
            assert (actual - wanted).norm() <= 1e-3 * wanted.norm()
