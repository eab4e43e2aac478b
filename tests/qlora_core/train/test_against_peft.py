"""Twenty steps beside a plain loop of transformers, peft and torch.optim, from the same NF4 weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_core import Dataset, TextEncoder, TrainConfig, train
from qlora_core.data import epoch_order, windows
from qlora_core.nn import LoraConfig, NF4Linear, add_lora, lora_modules
from qlora_core.train import Event, StepMetrics

STEPS, WARMUP, RATE, NORM, DECAY = 20, 3, 1e-2, 0.5, 0.01


def _factor(step: int, kind: str) -> float:
    """The schedule's share of the peak, written down once more."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    done = (step - WARMUP) / (STEPS - WARMUP)
    return {"linear": 1 - done, "constant": 1.0}[kind]


def _reference(base: Path, quantized: Any, seed: int) -> Any:
    """The same model in peft: the dequantized weights in dense layers, the same start of A."""
    dense: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for path, module in quantized.named_modules():
        if isinstance(module, NF4Linear):
            dense.get_submodule(path).weight.data.copy_(module.nf4.dequantize(torch.float32))
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    reference: Any = peft.get_peft_model(dense, lora)
    add_lora(quantized, LoraConfig(r=4, alpha=8), seed=seed)
    for path, module in lora_modules(quantized).items():
        theirs = reference.get_submodule(f"base_model.model.{path}").lora_A["default"].weight
        theirs.data.copy_(module.lora_A)
    return reference


def _plain_loop(reference: Any, dataset: Dataset, seed: int, kind: str) -> list[tuple[float, float]]:  # fmt: skip
    """Train as one does without a trainer; the loss and gradient norm of each step."""
    parameters = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(step, kind))
    order = (
        window
        for epoch in range(STEPS)
        for window in windows(epoch_order(len(dataset), seed=seed, epoch=epoch), 4)
    )
    told: list[tuple[float, float]] = []
    for _, window in zip(range(STEPS), order, strict=False):
        loss = reference(**_padded(dataset, window)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        told.append((float(loss.detach()), float(norm)))
    return told


def _padded(dataset: Dataset, window: list[int]) -> dict[str, torch.Tensor]:
    width = max(dataset.lengths[index] for index in window)
    ids = torch.zeros(len(window), width, dtype=torch.int64)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, index in enumerate(window):
        tokens, trained = dataset.example(index)
        ids[row, : len(tokens)] = tokens
        labels[row, : len(tokens)] = torch.where(trained, tokens.long(), -100)
        mask[row, : len(tokens)] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


# peft 0.21 asks transformers 5.23 by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")
@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, "linear"),
        ({"packing": False, "gradient_checkpointing": True}, "constant"),
        ({"micro_batch_tokens": 60}, "linear"),
    ],
    ids=["packed", "padded and recomputed", "accumulated"],
)
def test_the_loss_curve_is_that_of_a_plain_loop(
    settings: dict[str, Any],
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
    settings = {
        "n_epochs": STEPS, "max_steps": STEPS, "learning_rate": RATE, "warmup_steps": WARMUP,
        "lr_scheduler_type": kind, "max_grad_norm": NORM, "weight_decay": DECAY, "seed": 3,
        **settings,
    }  # fmt: skip
    reference = _reference(base, load(), seed=3)
    expected = _plain_loop(reference, dataset, 3, kind)

    train(model, encoder, dataset, config(**settings), events.append, output_dir=tmp_path)

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
