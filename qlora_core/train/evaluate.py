"""Validation: mean loss and accuracy over all trained tokens of a dataset, full logits never kept."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from qlora_core.data import Batching, Dataset
from qlora_core.train.loss import SupervisedLoss


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, loss_of: SupervisedLoss, dataset: Dataset, *, batching: Batching
) -> tuple[float, float]:
    """Return the mean loss in nats and the share of tokens predicted right, per trained token."""
    was_training = model.training
    model.eval()
    # Summed in float64: a float32 sum over millions of tokens loses digits.
    loss = torch.zeros((), dtype=torch.float64, device=model.device)
    n_correct = torch.zeros((), dtype=torch.int64, device=model.device)
    try:
        for batch in batching.split_all(dataset):
            found = loss_of(batch.to(model.device))
            loss += found.loss
            n_correct += found.n_correct
    finally:
        model.train(was_training)
    n_tokens = sum(dataset.trained_counts)
    return float(loss) / n_tokens, int(n_correct) / n_tokens
