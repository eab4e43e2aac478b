"""Training as one does without a trainer: transformers, peft and torch.optim in a plain loop. The oracle of loss curves."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_core import Dataset
from qlora_core.data import epoch_order, windows
from qlora_core.nn import LoraConfig, add_lora, lora_modules

STEPS, WARMUP, NORM, DECAY, BATCH_SIZE, SEED = 20, 3, 0.5, 0.01, 4, 3


def settings(*, kind: str, rate: float) -> dict[str, Any]:
    """What `TrainConfig` takes for the run that `plain_loop` does."""
    return {
        "n_epochs": STEPS, "max_steps": STEPS, "batch_size": BATCH_SIZE, "learning_rate": rate, "warmup_steps": WARMUP,
        "lr_scheduler_type": kind, "max_grad_norm": NORM, "weight_decay": DECAY, "seed": SEED, "lora": LoraConfig(r=4, alpha=8),
    }  # fmt: skip


def adapted_by_peft(reference: Any, ours: PreTrainedModel) -> Any:
    """Put peft's adapters over a model that has the weights of ``ours``, from the start of A that a run over ``ours`` has.

    ``ours`` gets adapters, too: load it again to train it.
    """
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted: Any = peft.get_peft_model(reference, lora)
    add_lora(ours, LoraConfig(r=4, alpha=8), seed=SEED)
    assert len(lora_modules(ours)) == sum(name.endswith("lora_A.default") for name, _ in adapted.named_modules())  # fmt: skip
    for path, module in lora_modules(ours).items():
        theirs = adapted.get_submodule(f"base_model.model.{path}").lora_A["default"].weight
        theirs.data.copy_(module.lora_A)
    return adapted


def plain_loop(
    reference: Any, dataset: Dataset, *, kind: str, rate: float
) -> list[tuple[float, float]]:
    """Train over padded batches; the loss and the gradient's norm of each step."""
    parameters = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(step, kind))
    order = (
        window
        for epoch in range(STEPS)
        for window in windows(epoch_order(len(dataset), seed=SEED, epoch=epoch), BATCH_SIZE)
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


def _factor(step: int, kind: str) -> float:
    """The schedule's share of the peak, written down once more."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    done = (step - WARMUP) / (STEPS - WARMUP)
    return {"linear": 1 - done, "constant": 1.0}[kind]


def _padded(dataset: Dataset, window: list[int]) -> dict[str, Tensor]:
    width = max(dataset.lengths[index] for index in window)
    ids = torch.zeros(len(window), width, dtype=torch.int64)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, index in enumerate(window):
        tokens, trained = dataset.example(index)
        ids[row, : len(tokens)] = tokens
        labels[row, : len(tokens)] = torch.where(trained, tokens.long(), -100)
        mask[row, : len(tokens)] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}
