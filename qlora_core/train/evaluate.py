"""Validation: mean loss and accuracy over all trained tokens of a dataset, full logits never kept."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from qlora_core.data import Dataset, collate, group_by_tokens, pass_tokens
from qlora_core.train.loss import SupervisedLoss


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    loss_of: SupervisedLoss,
    dataset: Dataset,
    *,
    micro_batch_tokens: int,
    pad_id: int,
) -> tuple[float, float]:
    """Return the mean loss in nats and the share of tokens predicted right, per trained token."""
    was_training = model.training
    model.eval()
    groups = group_by_tokens(
        range(len(dataset)),
        dataset.lengths,
        max_tokens=micro_batch_tokens,
        pass_tokens=pass_tokens(model.device),
    )
    # Summed in float64: a float32 sum over millions of tokens loses digits.
    loss = torch.zeros((), dtype=torch.float64, device=model.device)
    n_correct = torch.zeros((), dtype=torch.int64, device=model.device)
    for group in groups:
        batch_loss, batch_correct = loss_of(collate(dataset, group, pad_id=pad_id).to(model.device))
        loss += batch_loss
        n_correct += batch_correct
    model.train(was_training)
    n_tokens = sum(dataset.trained_counts)
    return float(loss) / n_tokens, int(n_correct) / n_tokens
